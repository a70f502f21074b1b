"""LoRA on every kind of layer: its update, its forward pass, its parameters, and the choice of layers."""

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import BASE
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from lora_algos.base import Adapted, LayerSpec, attach, select_layers
from lora_algos.config import AdapterError
from models import get_family
from models.config import ModelConfig

# kind of layer -> how it is made, the shape of an input to it
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(12, 20), (2, 5, 12)),
    "Linear without bias": (lambda: nn.Linear(12, 20, bias=False), (2, 12)),
    "Conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 11)),
    "Conv2d 1x1": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 5, 7)),
    "Conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 11)),
    "Conv2d 3x5": (lambda: nn.Conv2d(6, 8, (3, 5), padding=(1, 2)), (2, 6, 9, 11)),
    "Conv2d dilated": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2), (2, 6, 9, 11)),
    "Conv2d circular": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 9, 11)),
    "Conv3d": (lambda: nn.Conv3d(6, 8, 3, stride=(1, 2, 2), padding=1), (2, 6, 4, 7, 8)),
}
SPEC = LayerSpec(rank=4, alpha=6.0)
every_layer = pytest.mark.parametrize("kind", LAYERS)


def model_of(kind: str) -> tuple[nn.Module, Tensor]:
    """A model of one layer of that kind, called `layer`, and an input to it."""
    make, shape = LAYERS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleDict({"layer": make()}), torch.randn(shape)


@torch.no_grad()
def randomised(adapted: Adapted) -> Adapted:
    """With weights as after training: the update is no longer zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.named_parameters().values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return adapted


def closed_form(adapted: Adapted, layer: str, shape: torch.Size) -> Tensor:
    """alpha / rank * up @ down in fp64, from the numbers that a file would hold."""
    state, spec = adapted.state_dict(), adapted.specs()[layer]
    up, down = (state[f"{layer}.lora_{side}.weight"].double() for side in ("up", "down"))
    return spec.alpha / spec.rank * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).reshape(shape)


def unet() -> nn.Module:
    return UNet2DConditionModel.from_pretrained(BASE, subfolder="unet")


@every_layer
def test_a_new_adapter_changes_nothing(kind):
    model, x = model_of(kind)
    expected = model["layer"](x)
    adapted = attach(model, "LoRA", {"layer": SPEC}, seed=0)
    deltas = dict(adapted.deltas())
    assert deltas.keys() == {"layer"}
    assert deltas["layer"].count_nonzero() == 0
    assert adapted.state_dict()["layer.lora_down.weight"].count_nonzero() > 0
    assert model["layer"](x).equal(expected)


@every_layer
def test_delta_weight_is_the_closed_form(kind):
    model, _ = model_of(kind)
    shape = model["layer"].weight.shape
    adapted = randomised(attach(model, "LoRA", {"layer": SPEC}, seed=0))
    delta = dict(adapted.deltas())["layer"]
    assert delta.dtype == torch.float32
    expected = closed_form(adapted, "layer", shape)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(delta.double(), expected, rtol=0, atol=1e-6)


@every_layer
def test_forward_is_that_of_the_base_with_the_delta_added(kind):
    model, x = model_of(kind)
    expected = copy.deepcopy(model["layer"])
    adapted = randomised(attach(model, "LoRA", {"layer": SPEC}, seed=0))
    with torch.no_grad():
        expected.weight += closed_form(adapted, "layer", expected.weight.shape).float()
    torch.testing.assert_close(model["layer"](x), expected(x), rtol=1e-5, atol=1e-5)


@every_layer
def test_merging_gives_the_adapted_model(kind):
    model, x = model_of(kind)
    merged, _ = model_of(kind)
    untouched = merged["layer"].weight.clone()
    adapted = randomised(attach(model, "LoRA", {"layer": SPEC}, seed=0))
    adapted.merge_into(merged)
    assert not merged["layer"].weight.equal(untouched)
    torch.testing.assert_close(merged["layer"](x), model["layer"](x), rtol=1e-5, atol=1e-5)


def test_a_grouped_convolution_is_refused_by_name():
    model = nn.ModuleDict({"plain": nn.Conv2d(8, 8, 3), "grouped": nn.Conv2d(8, 8, 3, groups=4)})
    with pytest.raises(AdapterError, match=r"grouped: .*groups") as caught:
        attach(model, "LoRA", dict.fromkeys(["plain", "grouped"], SPEC), seed=0)
    assert "plain" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapter_trains_and_in_fp32(dtype):
    model = unet().to(dtype)
    adapted = attach(model, "LoRA", {"conv_in": SPEC, "mid_block.attentions.0.proj_in": SPEC}, seed=0)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapted.named_parameters().values()}
    assert len(trained) == 4
    assert {p.dtype for p in adapted.named_parameters().values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    prediction = model(torch.randn(1, 4, 8, 8).to(dtype), 5, torch.randn(1, 24, 96).to(dtype)).sample
    assert prediction.dtype == dtype
    prediction.float().square().mean().backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters().items() if "lora_up" in name)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_seed_decides_the_weights_and_the_global_rng_stays():
    def weights(seed: int) -> Tensor:
        model, _ = model_of("Conv2d")
        return attach(model, "LoRA", {"layer": SPEC}, seed).state_dict()["layer.lora_down.weight"]

    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = weights(7)
    assert torch.get_rng_state().equal(before)
    torch.rand(3)
    assert weights(7).equal(first)
    assert not weights(8).equal(first)


def test_a_layer_whose_name_ends_like_anothers_gets_its_own_rank_and_alpha():
    def block() -> nn.ModuleDict:
        return nn.ModuleDict({"proj": nn.Linear(6, 6), "projection": nn.Linear(6, 6), "1": nn.Linear(6, 6)})

    model = nn.ModuleDict({**block(), "a": nn.ModuleDict({**block(), "a": block()}), "1x": block(), "aXproj": block()})
    specs = {
        "proj": LayerSpec(1, 1.0),
        "a.proj": LayerSpec(2, 2.0),
        "a.a.proj": LayerSpec(3, 5.0),
        "a.projection": LayerSpec(1, 7.0),
        "1": LayerSpec(5, 1.0),
        "1x.1": LayerSpec(2, 11.0),
    }
    adapted = attach(model, "LoRA", specs, seed=0)
    assert adapted.specs() == specs
    assert {name: p.shape[0] for name, p in adapted.named_parameters().items() if "lora_down" in name} == {
        f"{name}.lora_down.weight": spec.rank for name, spec in specs.items()
    }


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
    assert names == [name for name, module in model.named_modules() if any(module is c for c in chosen)]
    assert len(names) == len(chosen) > 0


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("conv_in",), ["conv_in"]),
        ((r"mid_block\..*\.attn2\.to_[kv]",), ["to_k", "to_v"]),
        ((r"conv_(in|out)", "conv_in", r"time_embedding\..*"), ["conv_in", "linear_1", "linear_2", "conv_out"]),
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
    assert "atention: matches no layer; near it: attention" in text
    assert "to_q(: not a regular expression" in text
    assert "to_q: matches no layer" in text
    assert ".*nowhere.*: matches no layer" in text
    assert "conv_in: " not in text
    assert all(preset in text for preset in presets)


def test_loading_weights_that_do_not_fit_lists_every_fault():
    model, _ = model_of("Linear")
    adapted = attach(model, "LoRA", {"layer": SPEC}, seed=0)
    state = adapted.state_dict()
    wrong = {"layer.lora_down.weight": torch.zeros(3, 12), "other.lora_up.weight": torch.zeros(20, 4)}
    with pytest.raises(AdapterError) as caught:
        adapted.load_state_dict(wrong)
    text = str(caught.value)
    assert "layer.lora_down.weight: (3, 12) in the file, (4, 12) in the model" in text
    assert "layer.lora_up.weight: not in the file" in text
    assert "other.lora_up.weight: not in the model" in text
    assert all(adapted.state_dict()[name].equal(tensor) for name, tensor in state.items())
