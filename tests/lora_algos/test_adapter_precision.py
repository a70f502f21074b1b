"""A small update of a bf16 layer is not rounded away: what the layer computes, measured from outside."""

from collections.abc import Callable

import pytest
import torch
from helpers.adapter_cases import every_algorithm, every_mode, in_mode, scaled_update
from torch import Tensor, nn

from lora_algos.adapter import AdapterLayer
from lora_algos.attach import attach
from lora_algos.config import LayerSpec

SIDE, CHUNK, CHUNKS = 8, 2**16, 48  # chunks that stay in the caches
SMALL, LARGE = 1e-4, 3e-2  # ||dW|| / ||W||


def effective(layers: list[Callable[[Tensor], Tensor]], seed: int, dtype: torch.dtype) -> Tensor:
    """The matrix that best maps the inputs to what the second layer answers more than the first, by least squares."""
    generator = torch.Generator().manual_seed(seed)
    gram = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    cross = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    for _ in range(CHUNKS if dtype == torch.bfloat16 else 1):
        x = torch.randn(CHUNK, SIDE, generator=generator).to(dtype)
        before, after = (layer(x).double() for layer in layers)
        wide = x.double()
        gram += wide.T @ wide
        cross += wide.T @ (after - before)
    return torch.linalg.solve(gram, cross).T


def measured(
    layers: list[Callable[[Tensor], Tensor]], delta: Tensor, dtype: torch.dtype
) -> tuple[float, float]:
    """Relative error of the update that is computed, and the measurement's own noise, from two measurements."""
    first, second = (effective(layers, seed, dtype) for seed in (1, 2))
    size = delta.norm()
    return ((first + second) / 2 - delta).norm().item() / size.item(), (
        first - second
    ).norm().item() / 2 / size.item()


def updated(
    spec: LayerSpec, dtype: torch.dtype, ratio: float, bias: bool
) -> tuple[AdapterLayer, Callable[[Tensor], Tensor], Tensor]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(SIDE, SIDE, bias=bias)}).to(dtype)
    base = model["layer"]
    adapted = attach(model, {"layer": spec}, seed=0)
    scaled_update(adapted, ratio)
    layer = adapted.layers()["layer"]
    delta = layer.delta_weight().double()
    assert delta.norm() / base.weight.double().norm() == pytest.approx(ratio, rel=0.1)
    return layer, base, delta


@every_algorithm
@every_mode
@torch.no_grad()
def test_the_update_of_an_fp32_layer(spec, mode):
    layer, base, delta = updated(in_mode(spec, mode), torch.float32, SMALL, bias=True)
    error, noise = measured([base, layer], delta, torch.float32)
    assert noise < 0.005
    assert error < 0.01


@every_algorithm
@torch.no_grad()
def test_a_small_update_of_a_bf16_layer_is_in_the_sum_that_is_rounded(spec):
    """With dW formed, for every algorithm."""
    layer, base, delta = updated(in_mode(spec, "false"), torch.bfloat16, SMALL, bias=False)
    error, noise = measured([base, layer], delta, torch.bfloat16)
    assert noise < 0.009
    assert error < 0.01 + noise


@pytest.mark.parametrize("mode", ["true", "auto"])
@pytest.mark.parametrize("algorithm", ["LoRA", "LoHa", "LoKr"])
@torch.no_grad()
def test_a_small_update_of_a_bf16_layer_without_bias_costs_no_precision(algorithm, mode):
    """Factor by factor: the update is computed first, and the base's product is added to it."""
    layer, base, delta = updated(
        in_mode(LayerSpec(3, 5.0, algorithm), mode), torch.bfloat16, SMALL, bias=False
    )
    error, noise = measured([base, layer], delta, torch.bfloat16)
    assert noise < 0.009
    assert error < 0.01 + noise


@every_algorithm
@every_mode
@torch.no_grad()
def test_the_update_of_a_bf16_layer(spec, mode):
    """Elsewhere the base's output is rounded before the update meets it, so the update is taken larger than that."""
    layer, base, delta = updated(in_mode(spec, mode), torch.bfloat16, LARGE, bias=True)
    error, noise = measured([base, layer], delta, torch.bfloat16)
    assert noise < 0.002
    # channels whose magnitude has moved by less than a digit are DoRA's own weakness: a rounded output times nearly 1
    assert error < (0.03 if spec.algorithm == "DoRA" and mode != "false" else 0.01)


@torch.no_grad()
def test_the_measurement_tells_right_from_wrong():
    """A layer that rounds once passes, bf16(W + dW) does not, and nor does nothing."""
    _, base, delta = updated(LayerSpec(3, 5.0, "LoRA"), torch.bfloat16, SMALL, bias=True)
    weight, narrow = base.weight, delta.bfloat16()

    def once(x: Tensor) -> Tensor:  # both products in one sum
        return nn.functional.linear(torch.cat([x, x], 1), torch.cat([weight, narrow], 1), base.bias)

    def naive(x: Tensor) -> Tensor:
        return nn.functional.linear(x, (weight.double() + delta).bfloat16(), base.bias)

    error, noise = measured([base, once], delta, torch.bfloat16)
    assert noise < 0.009
    assert error < 0.01 + noise
    assert measured([base, naive], delta, torch.bfloat16)[0] > 0.3
    assert measured([base, base], delta, torch.bfloat16)[0] == pytest.approx(1)


@torch.no_grad()
def test_the_larger_update_too_tells_right_from_wrong():
    _, base, delta = updated(LayerSpec(3, 5.0, "LoRA"), torch.bfloat16, LARGE, bias=True)
    weight = (base.weight.double() + delta).bfloat16()
    assert (
        measured(
            [base, lambda x: nn.functional.linear(x, weight, base.bias)], delta, torch.bfloat16
        )[0]
        > 0.02
    )
