"""Layers of every type, specs of every algorithm, and the closed form of every update, for the tests of adapters.

The closed forms are written from the papers, with indices. They share no line with the code. All tables of specs
contain a new algorithm in the registry; its closed form must be added here.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lora_algos import ALGORITHMS
from lora_algos.adapted_model import AdaptedModel
from lora_algos.adapter import AdapterLayer
from lora_algos.attach import attach
from lora_algos.config import AdapterOptions, LayerSpec

# kind of layer -> how it is made, the shape of an input to it
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(12, 24), (2, 5, 12)),
    "Linear without bias": (lambda: nn.Linear(12, 24, bias=False), (3, 12)),
    "Conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 9)),
    "Conv2d": (lambda: nn.Conv2d(12, 16, 3, stride=2, padding=1), (2, 12, 7, 6)),
    "Conv2d without bias": (lambda: nn.Conv2d(6, 8, 3, bias=False), (2, 6, 5, 5)),
    "Conv2d 1x1": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 5, 4)),
    "Conv2d 3x5 dilated": (
        lambda: nn.Conv2d(6, 8, (3, 5), padding=(1, 2), dilation=(2, 1)),
        (2, 6, 7, 8),
    ),
    "Conv2d same": (lambda: nn.Conv2d(6, 8, (2, 4), padding="same"), (2, 6, 5, 6)),
    "Conv2d circular": (
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
        (2, 6, 5, 6),
    ),
    "Conv2d reflect same": (
        lambda: nn.Conv2d(6, 8, 2, padding="same", padding_mode="reflect"),
        (2, 6, 5, 6),
    ),
    "Conv2d groups": (lambda: nn.Conv2d(8, 16, 3, padding=1, dilation=2, groups=2), (2, 8, 6, 7)),
    "Conv2d 3 rows a group": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4), (2, 8, 5, 5)),
    "Conv3d": (
        lambda: nn.Conv3d(4, 8, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        (2, 4, 3, 6, 5),
    ),
    "Conv3d groups": (lambda: nn.Conv3d(4, 8, 2, groups=2, bias=False), (2, 4, 3, 4, 4)),
}
TWO_KINDS = ("Linear", "Conv2d")


def spec_of(algorithm: str, rank: int = 3, alpha: float = 5.0, **options) -> LayerSpec:
    return LayerSpec(rank, alpha, algorithm, AdapterOptions(**{"block_size": 6, **options}))


SPECS: dict[str, LayerSpec] = {name: spec_of(name) for name in ALGORITHMS}
VARIANTS: dict[str, LayerSpec] = {
    "LoRA rslora": spec_of("LoRA", rslora=True),
    "LoRA gaussian": spec_of("LoRA", init="gaussian"),
    "LoRA pissa": spec_of("LoRA", init="pissa"),
    "LoRA pissa_niter_4": spec_of("LoRA", init="pissa_niter_4"),
    "LoRA olora": spec_of("LoRA", init="olora"),
    "LoRA orthogonal": spec_of("LoRA", rank=2, init="orthogonal"),
    "DoRA rslora": spec_of("DoRA", rslora=True),
    "LoHa rank 1": spec_of("LoHa", rank=1),
    "LoHa tucker": spec_of("LoHa", tucker=True),
    "LoHa rslora": spec_of("LoHa", rank=2, rslora=True),
    "LoKr low rank": spec_of("LoKr", rank=1),
    "LoKr rslora": spec_of("LoKr", rank=2, rslora=True, factor=2),
    "LoKr factor": spec_of("LoKr", rank=2, factor=3),
    "LoKr both": spec_of("LoKr", rank=1, decompose_both=True),
    "LoKr whole": spec_of("LoKr", rank=1, full_matrix=True),
    "OFT constraint": spec_of("OFT", constraint=0.3),
    "BOFT one stage": spec_of("BOFT", stages=1),
    "GLoRA rslora": spec_of("GLoRA", rslora=True),
}
ALL_SPECS = {**SPECS, **VARIANTS}
TAKEN_OUT = (
    "pissa",
    "olora",
    "orthogonal",
)  # what these take out of the base is subtracted in the adapter

every_kind = pytest.mark.parametrize("kind", LAYERS)
two_kinds = pytest.mark.parametrize("kind", TWO_KINDS)
every_spec = pytest.mark.parametrize("spec", ALL_SPECS.values(), ids=ALL_SPECS.keys())
every_algorithm = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"]
)
every_mode = pytest.mark.parametrize("mode", ["true", "false", "auto"])


def in_mode(spec: LayerSpec, mode: str) -> LayerSpec:
    return replace(spec, bypass_mode=mode)


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """Return a model of one layer of that kind, called `layer`, and an input to it."""
    make, shape = LAYERS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleDict({"layer": make()}).to(dtype), torch.randn(shape).to(dtype)


@torch.no_grad()
def randomized(adapted: AdaptedModel, size: float = 0.3) -> AdaptedModel:
    """Return adapters as after training: each tensor moves by `size` from its first value."""
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.named_parameters().values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return adapted


def in_double(kind: str, spec: LayerSpec) -> tuple[AdaptedModel, AdapterLayer, Tensor]:
    """Return a trained adapter on a layer of that kind, the layer, and an input to it, all in fp64."""
    # PEFT's pissa and olora refuse an fp64 base, and DoRA keeps the norms of the base it is given
    taken_out = spec.options.init.startswith(TAKEN_OUT)
    model, x = model_of(kind, torch.float32 if taken_out else torch.float64)
    adapted = attach(model, {"layer": spec}, seed=0)
    model.double()
    return randomized(adapted), adapted.layers()["layer"], x.double()


@torch.no_grad()
def scaled_update(adapted: AdaptedModel, ratio: float) -> None:
    """Train adapters until their update is `ratio` times as large as the weight, by scaling a random move."""
    start = {name: parameter.clone() for name, parameter in adapted.named_parameters().items()}
    moved = {n: p - start[n] for n, p in randomized(adapted).named_parameters().items()}
    (layer,) = adapted.layers().values()
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        for name, parameter in adapted.named_parameters().items():
            parameter.copy_(start[name] + middle * moved[name])
        small = layer.delta_weight().norm() < ratio * layer.base_layer.weight.float().norm()
        low, high = (middle, high) if small else (low, middle)


def closed_form(tensors: dict[str, Tensor], spec: LayerSpec, weight: Tensor) -> Tensor:
    """Return the update of `weight` by its definition, from tensors by their names in a file, and constants."""
    assert spec.algorithm in CLOSED_FORMS, (
        "a new algorithm needs its closed form in tests/helpers/adapter_cases.py"
    )
    return CLOSED_FORMS[spec.algorithm](tensors, spec, weight)


def scale(spec: LayerSpec) -> float:
    return spec.alpha / (spec.rank**0.5 if spec.options.rslora else spec.rank)


def outer(up: Tensor, down: Tensor) -> Tensor:
    """sum_r up[o, r] down[r, i, ...]"""
    return torch.einsum("or,ri...->oi...", up.flatten(1), down)


def lora(t: dict[str, Tensor], spec: LayerSpec, weight: Tensor) -> Tensor:
    update = outer(t["lora_up.weight"], t["lora_down.weight"])
    if "initial_up" in t:
        update = update - outer(t["initial_up"], t["initial_down"])
    return scale(spec) * update


def dora(t: dict[str, Tensor], spec: LayerSpec, weight: Tensor) -> Tensor:
    moved = weight + lora(t, spec, weight)
    sides = (-1, *[1] * (weight.ndim - 1))
    # the paper's section 4.3: no gradient flows through the norm
    norm = moved.detach().flatten(1).norm(dim=1).view(sides)
    return t["lora_magnitude_vector"].view(sides) * moved / norm - weight


def loha(t: dict[str, Tensor], spec: LayerSpec, weight: Tensor) -> Tensor:
    parts = []
    for i in (1, 2):
        a, b = t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]
        if f"hada_t{i}" in t:
            parts.append(torch.einsum("pq...,po,qi->oi...", t[f"hada_t{i}"], a, b))
        else:
            parts.append(torch.einsum("or,rn->on", a, b).reshape(weight.shape))
    return scale(spec) * parts[0] * parts[1]


def lokr(t: dict[str, Tensor], spec: LayerSpec, weight: Tensor) -> Tensor:
    has_rank = "lokr_w1" not in t or "lokr_w2" not in t
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    (a, c), (out, channels, *kernel) = w1.shape, weight.shape
    w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    w2 = w2.reshape(out // a, channels // c, *kernel)
    # row a b, column c d, is w1[a, c] w2[b, d]
    product = torch.einsum("ac,bd...->abcd...", w1, w2).reshape(weight.shape)
    return product * (scale(spec) if has_rank else 1.0)


def rotations(blocks: Tensor, constraint: float = 0.0) -> Iterable[Tensor]:
    q = blocks - blocks.transpose(-1, -2)
    norm = q.norm() + 1e-8
    if constraint and norm > constraint:
        q = q * (constraint / norm)
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    return [torch.linalg.solve(eye - one, eye + one, left=False) for one in q]


def oft(t: dict[str, Tensor], spec: LayerSpec, weight: Tensor) -> Tensor:
    rotation = torch.block_diag(*rotations(t["oft_blocks"], spec.options.constraint))
    return torch.einsum("ko,ki...->oi...", rotation, weight) - weight


def boft(t: dict[str, Tensor], spec: LayerSpec, weight: Tensor) -> Tensor:
    turned, channels = weight, weight.shape[0]
    for stage, blocks in enumerate(t["oft_blocks"]):
        half = 2**stage * blocks.shape[-1] // 2
        # a block takes channels from both halves of every run of 2 * half channels in turn
        order = [
            run + side * half + i
            for run in range(0, channels, 2 * half)
            for i in range(half)
            for side in (0, 1)
        ]
        permutation = torch.eye(channels, dtype=weight.dtype)[order]
        rotation = permutation.T @ torch.block_diag(*rotations(blocks)) @ permutation
        turned = torch.einsum("ok,ki...->oi...", rotation, turned)
    return turned - weight


def glora(t: dict[str, Tensor], spec: LayerSpec, weight: Tensor) -> Tensor:
    on_input = torch.einsum(
        "oi...,ir,rj->oj...", weight, t["a1.weight"].flatten(1), t["a2.weight"].flatten(1)
    )
    return scale(spec) * (on_input + outer(t["b1.weight"], t["b2.weight"]))


CLOSED_FORMS: dict[str, Callable[[dict[str, Tensor], LayerSpec, Tensor], Tensor]] = {
    "LoRA": lora,
    "DoRA": dora,
    "LoHa": loha,
    "LoKr": lokr,
    "OFT": oft,
    "BOFT": boft,
    "GLoRA": glora,
    "Full": lambda t, spec, weight: t["diff"],
}
