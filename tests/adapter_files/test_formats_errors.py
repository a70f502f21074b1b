"""A broken adapter file is an error that lists all problems by layer, before the model is changed."""

import copy
import math

import pytest
import torch
from helpers.adapter_cases import every_spec, model_of, randomized
from torch import Tensor, nn

from adapter_files import FORMATS, convert, files, verification
from adapter_files.reader import import_layers
from adapter_files.spellings import LayerSpellings
from adapter_files.verification import MAX_ERROR, verify_content
from common.errors import AdapterError
from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import attach, attach_from_file
from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.detection import layer_delta

NAMES = LayerSpellings()


def model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "linear": nn.Linear(8, 12),
            "plain": nn.Linear(8, 12, bias=False),
            "conv": nn.Conv2d(8, 8, 3),
            "norm": nn.LayerNorm(8),
            "rms": nn.RMSNorm(8),
        }
    )


def lora(layer: str, rank: int = 2, **others: Tensor) -> dict[str, Tensor]:
    tensors = {
        "lora_up.weight": torch.ones(12, rank),
        "lora_down.weight": torch.ones(rank, 8),
        **others,
    }
    return {f"{layer}.{name}": tensor for name, tensor in tensors.items()}


BAD: dict[str, tuple[dict[str, Tensor], list[str]]] = {
    "two alphas": (lora("linear", alpha=torch.ones(2)), ["linear", "alpha is (2,): not one number"]),
    "no alpha in it": (lora("linear", alpha=torch.ones(0)), ["alpha is (0,): empty"]),
    "alpha of NaN": (lora("linear", alpha=torch.tensor(math.nan)), ["alpha: not finite"]),
    "infinite alpha": (lora("linear", alpha=torch.tensor(math.inf)), ["alpha: not finite"]),
    "rank 0": (lora("linear", rank=0), ["lora_up.weight is (12, 0): empty", "lora_down.weight is (0, 8): empty"]),
    "a number for a factor": ({**lora("linear"), "linear.lora_up.weight": torch.ones(())}, ["is (): not a matrix"]),
    "a vector for a factor": ({**lora("linear"), "linear.lora_down.weight": torch.ones(16)}, ["(16,): not a matrix"]),
    "a vector for a LoKr": ({"linear.lokr_w1": torch.ones(2), "linear.lokr_w2": torch.ones(6, 4)}, ["not a matrix"]),
    "a vector for an OFT": ({"linear.oft_blocks": torch.ones(12)}, ["oft_blocks is (12,): not a matrix"]),
    "a LoRA on a norm": (lora("norm"), ["norm: ", "normalization"]),
    "a bias that is not there": (lora("plain", diff_b=torch.ones(12)), ["plain: diff_b: the layer has no bias"]),
    "a norm's bias that is not there": (
        {"rms.diff": torch.ones(8), "rms.diff_b": torch.ones(8)},
        ["rms: ", "diff_b: the layer has no bias"],
    ),
    "a short bias": (lora("linear", diff_b=torch.ones(4)), ["diff_b is (4,) and should be (12,)"]),
    "an infinite bias": (lora("linear", diff_b=torch.ones(12) / 0), ["diff_b: not finite"]),
    "two spellings": (
        {**lora("linear"), "lora_unet_linear.lora_up.weight": torch.ones(12, 2)},
        ["lora_unet_linear.lora_up.weight (12, 2): the same tensor as linear.lora_up.weight"],
    ),
    "two magnitudes": (
        lora("linear", dora_scale=torch.ones(12, 1), lora_magnitude_vector=torch.ones(12)),
        ["dora_scale and lora_magnitude_vector: two forms of the same tensor"],
    ),
    "a core alone": ({"conv.lora_mid.weight": torch.ones(2, 2, 3, 3)}, ["lora_down.weight is missing"]),
    "a magnitude alone": ({"linear.dora_scale": torch.ones(12, 1)}, ["lora_down.weight is missing"]),
    "a LoKr's core alone": (
        {"conv.lokr_w1": torch.ones(2, 2), "conv.lokr_t2": torch.ones(2, 2, 3, 3)},
        ["lokr_w2_a is missing"],
    ),
    "half a LoKr": ({"linear.lokr_w1": torch.ones(2, 2), "linear.lokr_w2_b": torch.ones(2, 4)}, ["lokr_w2_a is miss"]),
    "half a LoHa": ({"linear.hada_w1_a": torch.ones(12, 2)}, ["hada_w1_b is missing", "hada_w2_a is missing"]),
    "many": (
        {**lora("linear", alpha=torch.ones(2)), **lora("plain", diff_b=torch.ones(12)), **lora("norm")},
        ["3 errors", "linear: alpha", "plain: diff_b", "norm: "],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_broken_file_is_refused_with_all_its_faults(case):
    tensors, words = BAD[case]
    there = model()
    kinds = [type(module) for module in there.modules()]
    with pytest.raises(AdapterError) as caught:
        attach_from_file(there, *import_layers(tensors, {}, there, NAMES))
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)
    assert [type(module) for module in there.modules()] == kinds


@pytest.mark.parametrize(
    "config", [{}, {"adapter_config": '{"peft_type": "LORA", "r": 2, "lora_alpha": 4}'}]
)
@pytest.mark.parametrize(
    "name", ["lora_up.weight", "lora_down.weight", "hada_w1_b", "lokr_w1", "lokr_w2", "a1.weight"]
)
def test_a_tensor_alone_is_a_fault_of_its_layer(name, config):
    there = model()
    layers, unknown = import_layers({f"linear.{name}": torch.ones(2, 2)}, config, there, NAMES)
    with pytest.raises(AdapterError, match="linear: "):
        attach_from_file(there, layers, unknown)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("alphas", [(0.0, 3.0), (3.0, 0.0), (0.0, 0.0)])
@torch.no_grad()
def test_an_alpha_of_0_is_no_update_in_every_format(file_format, alphas):
    tensors = {
        f"{name}.alpha": torch.tensor(alpha)
        for name, alpha in zip(("linear", "plain"), alphas, strict=True)
    }
    there = model()
    layers, unknown = import_layers(
        {**tensors, **lora("linear"), **lora("plain")}, {}, there, NAMES
    )
    assert not unknown
    names = LayerSpellings({name: name for name in there})
    content = files.file_content(layers, there, names, file_format, torch.float32)
    assert all(tensor.isfinite().all() for tensor in content.tensors.values())
    assert verify_content(content, layers, there, names) <= MAX_ERROR
    deltas = [layer_delta(layers[name], there[name].weight).norm() for name in ("linear", "plain")]
    assert [bool(delta) for delta in deltas] == [bool(alpha) for alpha in alphas]


@pytest.mark.parametrize("key", ["linear.lora_up.weight", "linear.diff_b"])
def test_what_is_not_finite_is_the_worst_error_there_is(monkeypatch, key):
    layers, unknown = import_layers(lora("linear", diff_b=torch.ones(12)), {}, model(), NAMES)
    assert not unknown
    content = files.file_content(layers, model(), NAMES, "kohya", torch.float32)
    spoilt = {name: {k: t.clone() for k, t in tensors.items()} for name, tensors in layers.items()}
    spoilt["linear"][key.removeprefix("linear.")][0] = math.nan
    monkeypatch.setattr(verification, "import_layers", lambda *arguments: (spoilt, []))
    assert verify_content(content, layers, model(), NAMES) == math.inf


@pytest.mark.parametrize("value", [math.nan, 3e38])
def test_an_update_that_is_not_finite_cannot_be_decomposed(value):
    weight = torch.zeros(12, 8)
    for tensors in (
        {"diff": torch.full((12, 8), math.nan)},
        {k[7:]: t * value for k, t in lora("linear").items()},
    ):
        with pytest.raises(AdapterError, match="not finite"):
            convert.nearest_lora({**tensors, "alpha": torch.tensor(200.0)}, weight, 2)


def written_and_verified(adapted: AdaptedModel) -> None:
    layers = files.adapter_layers(adapted)
    content = files.file_content(layers, adapted.model, NAMES, "kohya", torch.float32)
    verify_content(content, layers, adapted.model, NAMES)


def test_what_has_diverged_is_not_written_and_the_layer_is_named():
    there, _ = model_of("Linear")
    for init in ("default", "pissa"):
        model = nn.ModuleDict({"diverged": copy.deepcopy(there["layer"])})
        adapted = attach(
            model, {"diverged": LayerSpec(3, options=AdapterOptions(init=init))}, seed=0
        )
        with torch.no_grad():
            adapted.named_parameters()["diverged.lora_up.weight"][0] = math.nan
        with pytest.raises(AdapterError, match=r"diverged: (.|\n)*not finite"):
            written_and_verified(adapted)


@every_spec
def test_a_tucker_loha_is_a_lora_too(spec):
    """As everything is that has a rank."""
    if spec.algorithm not in ("LoRA", "LoHa", "LoKr"):
        return
    for kind in ("Linear", "Conv2d", "Conv3d"):
        there, _ = model_of(kind)
        adapted = randomized(attach(there, {"layer": spec}, seed=0))
        layers = files.adapter_layers(adapted)
        weight = there["layer"].base_layer.weight.detach()
        exact = convert.exact_lora(layers["layer"], weight.shape)
        assert {*exact} == {"lora_up.weight", "lora_down.weight", "alpha"}
        delta = layer_delta(layers["layer"], weight)
        torch.testing.assert_close(
            layer_delta(exact, weight), delta, rtol=0, atol=2e-6 * float(delta.norm())
        )


def test_while_the_update_is_merged_the_base_is_still_the_base():
    there, _ = model_of("Linear")
    before = there["layer"].weight.detach().clone()
    adapted = randomized(attach(there, {"layer": LayerSpec(3, algorithm="DoRA")}, seed=0))
    layers, names = files.adapter_layers(adapted), LayerSpellings({"layer": "layer"})
    expected = files.file_content(layers, there, names, "kohya", torch.float32).tensors
    adapted.merge()
    assert files.base_weights(there)["layer"].equal(before)
    content = files.file_content(layers, there, names, "kohya", torch.float32)
    assert all(tensor.equal(expected[key]) for key, tensor in content.tensors.items())
    assert verify_content(content, layers, there, names) <= MAX_ERROR
