"""Choosing layers and what each gets, attaching to them, and the handle on what is attached."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from helpers.adapter_cases import (
    SPECS,
    every_algorithm,
    every_dtype,
    every_spec,
    model_of,
    randomized,
    spec_of,
)
from helpers.project import BASE
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.errors import AdapterError
from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import attach, attach_from_file
from lora_algos.config import AdapterConfig, AdapterOptions, LayerSpec, Override
from lora_algos.plan import AdapterPlan
from lora_algos.targets import select_layers
from models.config import ModelConfig
from models.detect import get_family

SPEC = LayerSpec(rank=4, alpha=6.0)


def unet() -> nn.Module:
    return UNet2DConditionModel.from_pretrained(BASE, subfolder="unet")


def block() -> nn.ModuleDict:
    return nn.ModuleDict(
        {"proj": nn.Linear(6, 6), "projection": nn.Linear(6, 6), "1": nn.Linear(6, 6)}
    )


@every_algorithm
@every_dtype
def test_only_the_adapter_trains_and_in_fp32(spec, dtype):
    model = unet().to(dtype)
    names = ["conv_in", "mid_block.attentions.0.proj_in"]
    adapted = attach(model, dict.fromkeys(names, spec_of(spec.algorithm, block_size=32)), seed=0)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapted.named_parameters().values()}
    assert {p.dtype for p in adapted.named_parameters().values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    prediction = model(
        torch.randn(1, 4, 8, 8).to(dtype), 5, torch.randn(1, 24, 96).to(dtype)
    ).sample
    assert prediction.dtype == dtype
    prediction.float().square().mean().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32
        for p in adapted.named_parameters().values()
    )
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_layer_whose_name_ends_like_anothers_gets_its_own_rank_and_alpha():
    model = nn.ModuleDict(
        {**block(), "a": nn.ModuleDict({**block(), "a": block()}), "1x": block(), "aXproj": block()}
    )
    specs = {
        "proj": LayerSpec(1, 1.0),
        "a.proj": LayerSpec(2, 2.0),
        "a.a.proj": LayerSpec(3, 5.0),
        "a.projection": LayerSpec(1, 7.0),
        "1": LayerSpec(5, 1.0),
        "1x.1": LayerSpec(2, 11.0),
    }
    adapted = attach(model, specs, seed=0)
    assert adapted.specs() == specs
    assert {
        name: p.shape[0] for name, p in adapted.named_parameters().items() if "lora_down" in name
    } == {f"{name}.lora_down.weight": spec.rank for name, spec in specs.items()}


@pytest.mark.parametrize("preset", ["attention", "attention-mlp", "all"])
def test_presets_choose_the_layers_they_are_named_after(preset):
    model = unet()
    chosen: list[nn.Module] = []
    for module in model.modules():
        if preset == "all" and isinstance(module, nn.Linear | nn.Conv2d):
            chosen.append(module)
        elif preset != "all" and isinstance(module, Attention):
            chosen += [module.to_q, module.to_k, module.to_v, module.to_out[0]]
        elif preset == "attention-mlp" and isinstance(module, FeedForward):
            chosen += [m for m in module.modules() if isinstance(m, nn.Linear)]
    presets = get_family(ModelConfig(path=str(BASE))).targets
    names = select_layers(model, (preset,), presets)
    assert names == [
        name for name, module in model.named_modules() if any(module is c for c in chosen)
    ]
    assert len(names) == len(chosen) > 0


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("conv_in",), ["conv_in"]),
        ((r"mid_block\..*\.attn2\.to_[kv]",), ["to_k", "to_v"]),
        (
            (r"conv_(in|out)", "conv_in", r"time_embedding\..*"),
            ["conv_in", "linear_1", "linear_2", "conv_out"],
        ),
        ((r".*conv_shortcut", "conv_in"), None),
    ],
)
def test_patterns_match_whole_names_in_the_models_order(targets, expected):
    model = unet()
    names = select_layers(model, targets, {})
    order = [name for name, _ in model.named_modules()]
    assert names == sorted(set(names), key=order.index)
    if expected is not None:
        assert [name.rpartition(".")[2] for name in names] == expected


def test_all_bad_targets_are_listed_at_once():
    presets = get_family(ModelConfig(path=str(BASE))).targets
    with pytest.raises(AdapterError) as caught:
        select_layers(unet(), ("atention", "conv_in", "to_q(", "to_q", ".*nowhere.*"), presets)
    text = str(caught.value)
    assert "--adapter.targets" in text
    assert "atention: matches no layer; did you mean attention" in text
    assert "to_q(: not a regular expression" in text
    assert "to_q: matches no layer" in text
    assert ".*nowhere.*: matches no layer" in text
    assert "conv_in: " not in text
    assert all(preset in text for preset in presets)


def test_overrides_reach_the_layers_they_match_and_the_last_one_counts():
    model = nn.ModuleDict({"a": block(), "b": block()})
    overrides = (
        Override(r"a\..*", rank=2, lr_scale=0.5),
        Override(r".*\.projection", algorithm="LoKr", alpha=3.0),
        Override("fine", lr_scale=0.0),
    )
    config = AdapterConfig(targets=("all",), alpha=7.0, train_biases=True, overrides=overrides)
    presets = {"all": ".*", "fine": r"b\.1"}
    specs = AdapterPlan(config, "LoRA", 4, "true").specs(model, presets)
    assert list(specs) == [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    ]
    found = {name: (s.algorithm, s.rank, s.alpha, s.lr_scale) for name, s in specs.items()}
    assert found == {
        "a.proj": ("LoRA", 2, 7.0, 0.5), "a.projection": ("LoKr", 4, 3.0, 1.0), "a.1": ("LoRA", 2, 7.0, 0.5),
        "b.proj": ("LoRA", 4, 7.0, 1.0), "b.projection": ("LoKr", 4, 3.0, 1.0), "b.1": ("LoRA", 4, 7.0, 0.0),
    }  # fmt: skip
    assert {(s.bypass_mode, s.bias) for s in specs.values()} == {("true", True)}
    plain = AdapterPlan(replace(config, alpha=None), "LoRA", 4, "true").specs(model, presets)
    assert [plain[name].scaling for name in ("a.proj", "b.proj", "b.projection")] == [
        1.0,
        1.0,
        0.75,
    ]
    assert attach(model, specs, seed=0).specs() == specs


def test_all_bad_overrides_are_listed_at_once():
    overrides = (Override("nowhere"), Override("proj", algorithm="LoRa"), Override("(", rank=2))
    with pytest.raises(AdapterError) as caught:
        AdapterPlan(AdapterConfig(targets=(".*",), overrides=overrides), "LoRA", 4).specs(
            block(), {}
        )
    text = str(caught.value)
    assert "0.pattern = nowhere: matches no layer" in text
    assert "1.algorithm = LoRa: not one of LoRA, " in text
    assert "2.pattern = (: not a regular expression" in text


def test_learning_rate_scales_are_the_layers_times_lora_plus():
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    specs = {"a": LayerSpec(2, lr_scale=0.5, bias=True), "b": LayerSpec(2, algorithm="LoHa")}
    adapted = attach(model, specs, seed=0)
    scales = adapted.learning_rate_scales(16.0)
    assert scales.keys() == adapted.named_parameters().keys()
    assert {name: scale for name, scale in scales.items() if scale != 1.0} == {
        "a.lora_up.weight": 8.0, "a.lora_down.weight": 0.5, "a.diff_b": 0.5, "b.hada_w2_a": 16.0,
    }  # fmt: skip


@every_algorithm
def test_biases_are_trained_where_there_are_any(spec):
    model = nn.ModuleDict({"with": nn.Linear(12, 24), "without": nn.Linear(12, 24, bias=False)})
    spec = LayerSpec(spec.rank, spec.alpha, spec.algorithm, spec.options, bias=True)
    x = torch.randn(5, 12)
    expected = model["with"](x)
    adapted = attach(model, dict.fromkeys(model, spec), seed=0)
    assert [name for name in adapted.named_parameters() if "diff_b" in name] == ["with.diff_b"]
    diff_b = adapted.named_parameters()["with.diff_b"]
    assert model["with"](x).equal(expected)
    with torch.no_grad():
        diff_b += torch.arange(24.0)
    torch.testing.assert_close(model["with"](x), expected + torch.arange(24.0))
    model["with"](x).sum().backward()
    assert diff_b.grad.equal(torch.full((24,), 5.0))


@every_dtype
@pytest.mark.parametrize(
    "make",
    [lambda: nn.LayerNorm(12), lambda: nn.GroupNorm(3, 12), lambda: RMSNorm(12, 1e-6)],
    ids=["layer", "group", "rms"],
)
def test_norms_are_trained_in_fp32(make, dtype):
    model = nn.ModuleDict({"proj": nn.Linear(12, 12), "some_norm": make()}).to(dtype)
    config = AdapterConfig(targets=(".*",), train_norms=True, train_biases=True)
    x = torch.randn(4, 12).to(dtype)
    before, wide = model["some_norm"](x), make()
    adapted = attach(model, AdapterPlan(config, "LoRA", 4).specs(model, {}), seed=0)
    layer = adapted.layers()["some_norm"]
    assert layer(x).dtype == dtype
    torch.testing.assert_close(
        layer(x).float(), before.float(), rtol=0.01 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters().items():
            parameter.add_(
                0.001 if "some_norm" in name else 0.0
            )  # less than a digit of a bf16 weight of 1
        expected = (wide.weight + 0.001) * (wide(x.float()) / wide.weight)
        expected = expected + 0.001 if getattr(wide, "bias", None) is not None else expected
    assert layer(x).equal(expected.to(dtype)) or (layer(x) - expected).abs().max() < 0.01
    if dtype == torch.float32:
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    layer(x).float().square().sum().backward()
    names = {name for name, p in adapted.named_parameters().items() if p.grad is not None}
    assert names == {
        "some_norm.diff",
        *(["some_norm.diff_b"] if getattr(wide, "bias", None) is not None else []),
    }
    untouched = layer.base_layer.weight.clone()
    adapted.merge()
    assert layer.base_layer.weight.equal((untouched.float() + 0.001).to(dtype))
    adapted.unmerge()
    assert layer.base_layer.weight.equal(untouched)


@every_spec
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Conv2d groups"])
def test_a_model_without_values(spec, kind):
    """On the meta device and with fake tensors: names and shapes as on the CPU, and a step that reads no value."""
    if spec.options.init.startswith("pissa_niter"):
        pytest.skip("svd_lowrank reads values")
    model, x = model_of(kind)
    real = attach(model, {"layer": spec}, seed=0).state_dict()
    meta, _ = model_of(kind)
    state = attach(meta.to("meta"), {"layer": spec}, seed=0).state_dict()
    assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
        n: (t.shape, t.dtype) for n, t in real.items()
    }
    assert all(tensor.is_meta for tensor in state.values())
    with FakeTensorMode() as mode:
        named = {**dict(model["layer"].named_parameters()), **dict(model["layer"].named_buffers())}
        fake = {name: mode.from_tensor(tensor) for name, tensor in named.items()}
        y = functional_call(model["layer"], fake, (torch.randn(x.shape),))
        y.square().mean().backward()
    assert y.shape == model["layer"](x).shape
    assert all(
        fake[name].grad.shape == tensor.shape
        for name, tensor in named.items()
        if tensor.requires_grad
    )


class LargestTensor(TorchDispatchMode):
    """Elements of the largest new tensor of the block."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        for tensor in (t for t in tree_leaves(result) if isinstance(t, Tensor)):
            if tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return result


@every_algorithm
def test_attaching_makes_no_copy_of_a_weight(spec):
    model = nn.ModuleDict({"layer": nn.Linear(256, 256), "conv": nn.Conv2d(64, 64, 3)})
    with LargestTensor() as largest:
        attach(model, dict.fromkeys(model, spec), seed=0)
    assert (
        largest.elements < 64 * 64 * 9
        if spec.algorithm != "Full"
        else largest.elements == 256 * 256
    )


@every_spec
def test_state_goes_round(spec):
    model, x = model_of("Conv2d")
    state = randomized(attach(model, {"layer": spec}, seed=0)).state_dict()
    other, _ = model_of("Conv2d")
    adapted = attach(other, {"layer": spec}, seed=1)
    adapted.load_state_dict(state)
    assert all(adapted.state_dict()[name].equal(tensor) for name, tensor in state.items())
    assert other["layer"](x).equal(model["layer"](x))


def test_loading_weights_that_do_not_fit_lists_every_fault():
    model, _ = model_of("Linear")
    adapted = attach(model, {"layer": SPEC}, seed=0)
    state = adapted.state_dict()
    wrong = {
        "layer.lora_down.weight": torch.zeros(3, 12),
        "other.lora_up.weight": torch.zeros(20, 4),
    }
    with pytest.raises(AdapterError) as caught:
        adapted.load_state_dict(wrong)
    text = str(caught.value)
    assert "layer.lora_down.weight: (3, 12) in the file, (4, 12) in the model" in text
    assert "layer.lora_up.weight: not in the file" in text
    assert "other.lora_up.weight: not in the model" in text
    assert all(adapted.state_dict()[name].equal(tensor) for name, tensor in state.items())


def test_every_layer_that_an_algorithm_does_not_fit_is_named():
    model = nn.ModuleDict(
        {"prime": nn.Linear(4, 7), "fits": nn.Linear(4, 8), "odd": nn.Linear(4, 9)}
    )
    with pytest.raises(AdapterError) as caught:
        attach(
            model,
            {name: SPECS["OFT"] if name != "odd" else SPECS["BOFT"] for name in model},
            seed=0,
        )
    assert "prime: no block_size up to 6" in str(caught.value)
    assert "odd: " in str(caught.value)
    assert "fits" not in str(caught.value).replace("that fits", "").replace("fits its", "")
    assert all(p.requires_grad for p in model.parameters()), "the model was touched"


USELESS = {
    "LoRA": {"tucker": True, "factor": 4, "decompose_both": True, "full_matrix": True, "block_size": 8,
             "constraint": 0.1, "stages": 1},
    "DoRA": {"tucker": True, "block_size": 8},
    "LoHa": {"init": "pissa", "factor": 4},
    "LoKr": {"init": "gaussian", "tucker": True, "constraint": 0.1},
    "OFT": {"rslora": True, "factor": 4, "tucker": True, "stages": 2, "init": "olora"},
    "BOFT": {"rslora": True, "full_matrix": True},
    "GLoRA": {"init": "pissa", "block_size": 8},
    "Full": {"rslora": True, "init": "gaussian", "block_size": 8},
}  # fmt: skip
USEFUL = {
    "LoRA": {"rslora": True, "init": "pissa"},
    "DoRA": {"rslora": True, "init": "gaussian"},
    "LoHa": {"rslora": True, "tucker": True},
    "LoKr": {"rslora": True, "factor": 4, "decompose_both": True, "full_matrix": True},
    "OFT": {"block_size": 8, "constraint": 0.1},
    "BOFT": {"block_size": 8, "constraint": 0.1, "stages": 1},
    "GLoRA": {"rslora": True},
    "Full": {},
}


def both_kinds() -> nn.ModuleDict:
    return nn.ModuleDict({"linear": nn.Linear(8, 16), "conv": nn.Conv2d(8, 16, 3)})


@every_algorithm
def test_options_that_no_layer_has_a_use_for_are_refused_together(spec):
    useless, useful = USELESS[spec.algorithm], USEFUL[spec.algorithm]
    config = AdapterConfig(targets=(".*",), **{**useful, **useless})
    with pytest.raises(AdapterError) as caught:
        AdapterPlan(config, spec.algorithm, 2).specs(both_kinds(), {})
    faults = str(caught.value).splitlines()[1:]
    assert {fault.strip() for fault in faults} == {
        f"{name} = {value}" for name, value in useless.items()
    }
    config = AdapterConfig(
        targets=(".*",), dropout=0.1, rank_dropout=0.1, module_dropout=0.1, **useful
    )
    assert attach(
        both_kinds(), AdapterPlan(config, spec.algorithm, 2).specs(both_kinds(), {}), seed=0
    )


@pytest.mark.parametrize(
    ("algorithm", "options", "layer"),
    [("LoRA", {"init": "pissa"}, "conv"), ("LoHa", {"tucker": True}, "linear")],
)
def test_an_option_that_fits_none_of_the_chosen_layers_is_refused(algorithm, options, layer):
    with pytest.raises(AdapterError, match="no adapted layer"):
        AdapterPlan(AdapterConfig(targets=(layer,), **options), algorithm, 2).specs(
            both_kinds(), {}
        )


def test_an_override_may_be_the_one_that_has_a_use_for_an_option():
    config = AdapterConfig(
        targets=(".*",), block_size=8, overrides=(Override("linear", algorithm="OFT"),)
    )
    specs = AdapterPlan(config, "LoRA", 2).specs(both_kinds(), {})
    assert {name: spec.algorithm for name, spec in specs.items()} == {
        "linear": "OFT",
        "conv": "LoRA",
    }


def continued(overrides: tuple[Override, ...], **options) -> AdaptedModel:
    model = both_kinds()
    tensors = {
        "linear": {"lora_up.weight": torch.ones(16, 2), "lora_down.weight": torch.ones(2, 8)},
        "conv": {"lora_up.weight": torch.ones(16, 3), "lora_down.weight": torch.ones(3, 8, 3, 3)},
    }
    config = AdapterConfig(targets=("nowhere",), overrides=overrides, **options)
    return attach_from_file(
        model, tensors, [], AdapterPlan(config, "OFT", 7), {"convolutions": "conv"}
    )


def test_a_continued_adapter_takes_the_dropouts_and_the_learning_rates_of_the_config():
    adapted = continued(
        (Override(".*", lr_scale=3.0), Override("convolutions", lr_scale=0.5)), dropout=0.2
    )
    assert {n: (s.algorithm, s.rank, s.lr_scale, s.options.dropout) for n, s in adapted.specs().items()} == {
        "linear": ("LoRA", 2, 3.0, 0.2), "conv": ("LoRA", 3, 0.5, 0.2),
    }  # fmt: skip
    assert set(adapted.learning_rate_scales(1.0).values()) == {3.0, 0.5}


def test_overrides_that_match_nothing_of_a_continued_adapter_are_listed():
    with pytest.raises(
        AdapterError,
        match=r"0.pattern = norm: matches no layer(.|\n)*1.pattern = \(: not a regular",
    ):
        continued((Override("norm", lr_scale=1.0), Override("(", lr_scale=1.0)))


def test_attaching_leaves_the_generators_as_they_are(monkeypatch):
    def reseed(seed: int) -> None:
        raise AssertionError("the GPU's generator is reseeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseed)
    model = nn.Sequential(nn.Linear(4, 4))
    before = torch.get_rng_state()
    attach(model, {"0": LayerSpec(2, 2.0, "LoRA", AdapterOptions())}, 0)
    assert torch.get_rng_state().equal(before)


@torch.no_grad()
def test_the_strength_counts_for_norms_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GroupNorm(2, 8))
    plain = copy.deepcopy(model)
    config = AdapterConfig(targets=(".*",), train_norms=True, train_biases=True)
    adapted = attach(model, AdapterPlan(config, "LoRA", 2, "auto").specs(model, {}), 0)
    for parameter in adapted.named_parameters().values():
        parameter.add_(0.1 * torch.randn_like(parameter))
    for name, layer in adapted.layers().items():
        x = torch.randn(4, 8)
        base, output = plain.get_submodule(name)(x), layer(x)
        assert not torch.allclose(base, output)
        for strength in (0.0, -1.0):
            with adapted.at_strength(strength):
                expected = base + strength * (output - base)
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
