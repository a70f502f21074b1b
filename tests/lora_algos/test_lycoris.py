"""The updates and their gradients are those of lycoris-lora's functional forms, where these are right (the rest is in
test_adapter_regressions.py)."""

from collections.abc import Callable

import pytest
import torch
from helpers.adapter_cases import ALL_SPECS, TAKEN_OUT, in_double, scale
from lycoris.functional import boft, diag_oft, locon, loha, lokr
from lycoris.functional.general import factorization as lycoris_factorization
from lycoris.functional.general import weight_decompose
from lycoris.modules.glora import _glora_weight
from torch import Tensor

from lora_algos.config import LayerSpec
from lora_algos.lokr import factorization

# kinds whose weights cover what the functional forms know: they have no operation
KINDS = [
    "Linear",
    "Conv1d",
    "Conv2d",
    "Conv2d 1x1",
    "Conv2d 3x5 dilated",
    "Conv3d",
    "Conv2d 3 rows a group",
]
Tensors = dict[str, Tensor]


def of_lora(t: Tensors, spec: LayerSpec, weight: Tensor) -> Tensor:
    return locon.diff_weight(t["lora_down.weight"], t["lora_up.weight"], None, gamma=scale(spec))


def of_dora(t: Tensors, spec: LayerSpec, weight: Tensor) -> Tensor:
    magnitude = t["lora_magnitude_vector"].reshape(-1, *[1] * (weight.ndim - 1))
    return weight_decompose(weight + of_lora(t, spec, weight), magnitude) - weight


def of_loha(t: Tensors, spec: LayerSpec, weight: Tensor) -> Tensor:
    names = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a", "hada_t1", "hada_t2")
    gamma = torch.tensor(scale(spec), dtype=torch.float64)
    return loha.diff_weight(*(t.get(name) for name in names), gamma=gamma).reshape(weight.shape)


def of_lokr(t: Tensors, spec: LayerSpec, weight: Tensor) -> Tensor:
    names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    given = {name: t.get(name) for name in names}
    if "lokr_w2_b" in t and weight.ndim > 2:
        # (rank, channels, *kernel) there
        columns = t.get("lokr_w1", t.get("lokr_w1_b")).shape[1]
        given["lokr_w2_b"] = t["lokr_w2_b"].reshape(
            spec.rank, weight.shape[1] // columns, *weight.shape[2:]
        )
    return lokr.diff_weight(*given.values(), None, gamma=scale(spec) * spec.rank)


def of_oft(t: Tensors, spec: LayerSpec, weight: Tensor) -> Tensor:
    return diag_oft.diff_weight(
        weight.float(), t["oft_blocks"].float(), None, constraint=spec.options.constraint
    )


def of_boft(t: Tensors, spec: LayerSpec, weight: Tensor) -> Tensor:
    return boft.diff_weight(weight.float(), t["oft_blocks"].float(), None, constraint=0)


def of_glora(t: Tensors, spec: LayerSpec, weight: Tensor) -> Tensor:
    names = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    return _glora_weight(weight, *(t[name] for name in names), None, scale(spec))


THEIRS: dict[str, Callable[[Tensors, LayerSpec, Tensor], Tensor]] = {
    "LoRA": of_lora, "DoRA": of_dora, "LoHa": of_loha, "LoKr": of_lokr, "OFT": of_oft, "BOFT": of_boft,
    "GLoRA": of_glora,
}  # fmt: skip
# what an initialization takes out of the base is not in their forms; Full has none
SHARED = {
    name: spec
    for name, spec in ALL_SPECS.items()
    if spec.algorithm in THEIRS and not spec.options.init.startswith(TAKEN_OUT)
}
# theirs is for fp32 alone
TOLERANCE = {"OFT": 1e-5, "BOFT": 1e-5}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SHARED.values(), ids=SHARED.keys())
def test_update_and_gradients_are_those_of_lycoris(spec, kind):
    adapted, layer, _ = in_double(kind, spec)
    weight = layer.base_layer.weight.detach()
    ours, size = layer.delta_weight(), TOLERANCE.get(spec.algorithm, 1e-12)
    named = {name.removeprefix("layer."): p for name, p in adapted.named_parameters().items()}
    theirs = THEIRS[spec.algorithm](named, spec, weight)
    assert ours.norm() > 0.05 * weight.norm()
    torch.testing.assert_close(
        ours, theirs.double(), rtol=0, atol=size * max(1, ours.abs().max().item())
    )
    if spec.algorithm == "DoRA":
        return  # through the norm they let the gradient flow
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(theirs, named.values(), grad.to(theirs.dtype))
    actual = torch.autograd.grad(ours, named.values(), grad)
    for mine, other in zip(actual, expected, strict=True):
        assert other.norm() > 0
        assert (mine - other).norm() <= 10 * size * other.norm()


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 7, 8, 12, 16])
def test_lokr_splits_channels_as_lycoris_does(factor):
    for channels in [
        *range(1, 130),
        250,
        320,
        360,
        512,
        640,
        960,
        1024,
        1280,
        1920,
        2560,
        3072,
        3840,
        5120,
        10240,
    ]:
        assert factorization(channels, factor) == lycoris_factorization(channels, factor), channels


@pytest.mark.parametrize(
    "name", [name for name, spec in SHARED.items() if spec.algorithm == "LoKr"]
)
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_lokr_decomposes_what_lycoris_decomposes(name, kind):
    adapted, layer, _ = in_double(kind, SHARED[name])
    options = SHARED[name].options
    if options.full_matrix and kind == "Linear":
        return  # theirs has no such option on Linear layers
    theirs = lokr.weight_gen(
        layer.base_layer.weight, SHARED[name].rank, tucker=False, factor=options.factor,
        decompose_both=options.decompose_both, full_matrix=options.full_matrix,
    )  # fmt: skip
    names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    expected = {
        key: tensor.numel()
        for key, tensor in zip(names, theirs, strict=False)
        if tensor is not None
    }
    assert {
        key.removeprefix("layer."): t.numel() for key, t in adapted.state_dict().items()
    } == expected
