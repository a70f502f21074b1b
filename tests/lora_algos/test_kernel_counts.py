"""How many kernels an adapted layer launches: fewer than PEFT's and LyCORIS' layers with the same setting.

On a GPU each launch costs the host 5 to 10 microseconds, whatever the kernel does. Operations without a kernel (views,
empty tensors) are not counted. The factors are prepared, as in every micro-batch but the first one of a step.
"""

from collections import Counter

import pytest
import torch
from helpers.kernel_count import KernelCount
from torch import Tensor, nn

from benchmarks.adapter_tables import OURS
from benchmarks.adapters import TINY_CASES, implementations
from benchmarks.implementations import SETTINGS, Layer, Setting
from lora_algos.adapted_model import AdaptedModel
from lora_algos.adapter import AdapterLayer

ROUNDS_THE_SUM = "Full"
"""LyCORIS' Full rounds W + dW to bf16, in which most updates vanish. Ours needs a second product."""


def count(layer: Layer, x: Tensor) -> Counter[str]:
    """Return the kernels of a forward and backward pass under autocast."""
    parameters = [x, *layer.trained]

    def passes() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer.module(x)
        torch.autograd.grad(y, parameters, torch.ones_like(y))

    passes()
    with KernelCount() as kernels:
        passes()
    kernels.counts.subtract({"aten.ones_like": 1})
    return kernels.counts


def layers_of(setting: Setting, kind: str) -> tuple[dict[str, Layer], Tensor]:
    """Return the layers of all libraries that have the setting, with trained factors, and an input."""
    case = TINY_CASES[kind]
    torch.manual_seed(0)
    base = case.make().bfloat16().requires_grad_(False)
    layers = {}
    for name, layer in implementations(setting, base):
        if isinstance(layer, Layer):
            layers[name] = layer
    own = layers[OURS].module
    assert isinstance(own, AdapterLayer)
    AdaptedModel(nn.ModuleDict({"layer": own})).prepare_once_per_step()
    return layers, torch.randn(case.shape, requires_grad=True)


@pytest.mark.parametrize("kind", TINY_CASES)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_fewer_kernels_than_in_other_libraries(setting, kind):
    if setting.spec.algorithm == ROUNDS_THE_SUM:
        pytest.skip("not compared: LyCORIS rounds the sum of weight and update to bf16")
    layers, x = layers_of(setting, kind)
    counts = {name: sum(count(layer, x).values()) for name, layer in layers.items()}
    own = counts.pop(OURS)
    assert counts
    assert own < min(counts.values()), counts


@pytest.mark.parametrize(
    ("name", "expected"), {"LoRA r16": 12, "DoRA r16": 22, "OFT b32": 15}.items()
)
def test_the_counts_of_a_linear_layer(name, expected):
    """Two of them convert the input and its gradient, as for a frozen layer, which launches four."""
    setting = next(setting for setting in SETTINGS if setting.name == name)
    layers, x = layers_of(setting, "Linear 64")
    counts = count(layers[OURS], x)
    assert sum(counts.values()) == expected, counts
