"""The three dropouts: off in evaluation, a function of the seed, right on average, and the same when recomputed."""

from dataclasses import replace

import pytest
import torch
from helpers.adapter_cases import ALL_SPECS, every_mode, in_double, in_mode
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_algos import get_algorithm
from lora_algos.config import LayerSpec

DROPOUTS = ({"dropout": 0.3}, {"rank_dropout": 0.4}, {"module_dropout": 0.5})
every_dropout = pytest.mark.parametrize(
    "dropout", DROPOUTS, ids=lambda dropout: next(iter(dropout))
)
every_spec = pytest.mark.parametrize("spec", ALL_SPECS.values(), ids=ALL_SPECS.keys())
# rank_dropout of these is not unbiased: LoRA's ranks are under a norm, a rotation is no sum over its blocks
NOT_A_SUM = ("DoRA", "OFT", "BOFT")


def dropping(spec: LayerSpec, **options: float) -> LayerSpec:
    return replace(spec, options=replace(spec.options, **options))


def drawn(layer, x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return layer(x)


@every_spec
@every_dropout
@every_mode
@torch.no_grad()
def test_a_seed_decides_and_evaluation_drops_nothing(spec, dropout, mode):
    _, layer, x = in_double("Linear", dropping(in_mode(spec, mode), **dropout))
    draws = [drawn(layer, x, seed) for seed in range(12)]
    assert any(not draw.equal(draws[0]) for draw in draws)
    assert drawn(layer, x, 3).equal(draws[3])
    layer.eval()
    evaluated = layer(x)
    expected = layer.op(x, layer.base_layer.weight + layer.delta_weight(), layer.base_layer.bias)
    torch.testing.assert_close(evaluated, expected, rtol=0, atol=1e-11)


@every_spec
@every_mode
@torch.no_grad()
def test_module_dropout_drops_the_whole_update_or_nothing(spec, mode):
    _, layer, x = in_double("Linear", dropping(in_mode(spec, mode), module_dropout=0.5))
    base, whole = layer.base_layer(x), layer.eval()(x)
    layer.train()
    dropped = 0
    for seed in range(24):
        y = drawn(layer, x, seed)
        expected = base if (y - base).norm() < (y - whole).norm() else whole
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
        dropped += expected is base
    assert 4 < dropped < 20


@every_spec
@pytest.mark.parametrize("dropout", DROPOUTS[:2], ids=lambda dropout: next(iter(dropout)))
@torch.no_grad()
def test_the_average_over_many_draws_is_the_whole_update(spec, dropout):
    if "rank_dropout" in dropout and spec.algorithm in NOT_A_SUM:
        pytest.skip("not a sum over what is dropped")
    _, layer, x = in_double("Linear", dropping(spec, **dropout))
    x = x.flatten(0, 1)[:1]
    expected = layer.eval()(x) - layer.base_layer(x)
    layer.train()
    torch.manual_seed(0)
    draws = torch.stack([layer(x) for _ in range(1500)]) - layer.base_layer(x)
    error = draws.mean(0) - expected
    deviation = (draws.std(0) / len(draws) ** 0.5).norm()
    assert error.norm() < 3 * deviation
    assert deviation < 0.1 * expected.norm()  # else the line above says nothing


@every_spec
@every_dropout
def test_recomputing_draws_the_same_masks(spec, dropout):
    adapted, layer, x = in_double("Conv2d", dropping(spec, **dropout))
    tensors = [*adapted.named_parameters().values()]

    def gradients(recompute: bool, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return list(torch.autograd.grad(y.sin().sum(), tensors))

    for seed in range(3):
        for mine, other in zip(gradients(True, seed), gradients(False, seed), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


@every_spec
@every_dropout
def test_gradients_of_a_draw_are_those_of_its_update(spec, dropout):
    """By finite differences, with the masks held."""
    adapted, layer, x = in_double("Linear", dropping(spec, **dropout))
    if spec.algorithm == "DoRA":
        return  # no gradient flows through its norm
    x.requires_grad_()
    inputs = [x, *adapted.named_parameters().values()]
    directions = [
        torch.randn(t.shape, generator=torch.Generator().manual_seed(5), dtype=t.dtype)
        for t in inputs
    ]
    seed = next(
        seed for seed in range(20) if drawn(layer, x, seed).sub(layer.base_layer(x)).norm() > 0.01
    )
    analytic = torch.autograd.grad(drawn(layer, x, seed).sin().sum(), inputs)
    slope = sum((g * d).sum() for g, d in zip(analytic, directions, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for tensor, direction in zip(inputs, directions, strict=True):
                tensor.add_(direction, alpha=step)
            values.append(drawn(layer, x, seed).sin().sum())
    assert abs((values[0] - values[1]) / 2e-6 - slope) < 1e-6 * max(1, abs(slope))


def test_what_is_drawn_does_not_hang_on_the_order_of_a_set():
    """String hashes differ from process to process, and with them the order of sets of names."""
    assert isinstance(get_algorithm("GLoRA").traits.dropout_axes, dict)
    spec = dropping(ALL_SPECS["GLoRA"], rank_dropout=0.5)
    _, layer, _ = in_double("Linear", spec)
    torch.manual_seed(0)
    expected = layer.masked_tensors(dict(layer.update_tensors()))
    torch.manual_seed(0)
    backwards = layer.masked_tensors(dict(reversed(layer.update_tensors().items())))
    assert all(backwards[name].equal(tensor) for name, tensor in expected.items())
