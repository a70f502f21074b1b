"""Every algorithm on every kind of layer: the update is the closed form, zero at first, and merged exactly."""

import copy

import pytest
import torch
from helpers.adapter_cases import (
    ALL_SPECS,
    LAYERS,
    closed_form,
    every_algorithm,
    every_dtype,
    every_kind,
    every_spec,
    in_double,
    in_mode,
    model_of,
    randomized,
)  # fmt: skip
from torch import nn

from lora_algos import ALGORITHMS
from lora_algos.attach import attach


def test_every_algorithm_of_the_registry_is_tested():
    assert {spec.algorithm for spec in ALL_SPECS.values()} == set(ALGORITHMS)


@every_kind
@every_spec
def test_delta_weight_is_the_closed_form(spec, kind):
    adapted, layer, _ = in_double(kind, spec)
    weight = layer.base_layer.weight
    state = {name.removeprefix("layer."): tensor for name, tensor in adapted.state_dict().items()}
    delta, expected = layer.delta_weight(), closed_form(state, spec, weight)
    assert delta.shape == weight.shape
    assert expected.norm() > 0.05 * weight.norm()
    torch.testing.assert_close(
        delta, expected, rtol=0, atol=1e-12 * max(1.0, expected.abs().max().item())
    )


@every_kind
@every_spec
@torch.no_grad()
def test_forward_is_that_of_the_layer_with_the_delta_added(spec, kind):
    adapted, layer, x = in_double(kind, spec)
    plain = copy.deepcopy(layer.base_layer)
    plain.weight += dict(adapted.deltas())["layer"]
    for mode in ("true", "false", "auto"):
        layer.spec = in_mode(spec, mode)
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-11)


@every_kind
@every_spec
@torch.no_grad()
def test_a_strength_multiplies_the_update(spec, kind):
    """As programs do that load the adapter: W + strength x dW."""
    adapted, layer, x = in_double(kind, spec)
    plain = copy.deepcopy(layer.base_layer)
    delta = dict(adapted.deltas())["layer"]
    own_output = layer(x)
    for strength in (0.0, 0.5, 1.25, -1.0):
        scaled = copy.deepcopy(plain)
        scaled.weight += strength * delta
        with adapted.at_strength(strength):
            torch.testing.assert_close(layer(x), scaled(x), rtol=0, atol=1e-11)
    assert layer(x).equal(own_output)


@every_kind
@every_spec
@every_dtype
@torch.no_grad()
def test_a_new_adapter_changes_nothing(spec, kind, dtype):
    model, x = model_of(kind, dtype)
    expected, untouched = model["layer"](x), copy.deepcopy(model["layer"].state_dict())
    adapted = attach(model, {"layer": spec}, seed=0)
    layer = adapted.layers()["layer"]
    assert all(
        tensor.equal(untouched[name]) for name, tensor in layer.base_layer.state_dict().items()
    )
    assert layer.delta_weight().shape == untouched["weight"].shape
    assert layer.delta_weight().count_nonzero() == 0
    # the two products that pissa, olora and orthogonal subtract are summed in another order on activations
    cancels = "initial_up" in layer.constants()
    for mode in ("true", "false", "auto"):
        layer.spec = in_mode(spec, mode)
        y = layer(x)
        assert y.dtype == dtype
        if cancels and mode != "false":
            size = 2e-6 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(y, expected, rtol=0, atol=size * expected.abs().max().item())
        else:
            assert y.equal(expected), mode


@every_spec
def test_something_moves_in_the_first_step(spec):
    """A zero update must not be a saddle: some tensor's gradient is not zero."""
    model, x = model_of("Conv2d")
    adapted = attach(model, {"layer": spec}, seed=0)
    model["layer"](x).square().sum().backward()
    grads = {name: p.grad for name, p in adapted.named_parameters().items()}
    assert all(grad is not None for grad in grads.values())
    assert any(grad.abs().max() > 1e-4 for grad in grads.values())


@every_kind
@every_spec
@torch.no_grad()
def test_merging_gives_the_adapted_layer(spec, kind):
    adapted, layer, x = in_double(kind, spec)
    expected, delta = layer(x), layer.delta_weight()
    fresh = nn.ModuleDict({"layer": copy.deepcopy(layer.base_layer)})
    adapted.merge_into(fresh)
    torch.testing.assert_close(fresh["layer"](x), expected, rtol=0, atol=1e-11)
    adapted.merge()
    adapted.merge()  # a second time changes nothing
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(layer.delta_weight(), delta, rtol=0, atol=1e-12)
    adapted.unmerge()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


@every_algorithm
@every_dtype
@pytest.mark.parametrize("kind", ["Linear", "Conv2d groups"])
@torch.no_grad()
def test_unmerging_restores_weight_and_bias_bit_for_bit(spec, dtype, kind):
    model, _ = model_of(kind, dtype)
    spec = type(spec)(spec.rank, spec.alpha, spec.algorithm, spec.options, bias=True)
    before = copy.deepcopy(model["layer"].state_dict())
    adapted = randomized(attach(model, {"layer": spec}, seed=0))
    base, delta = model["layer"].base_layer, model["layer"].delta_weight()
    exact = (before["weight"].float() + delta).to(dtype)
    fresh = nn.ModuleDict({"layer": copy.deepcopy(base)})
    adapted.merge()
    assert base.weight.equal(exact)  # rounded once
    assert base.bias.equal((before["bias"].float() + model["layer"].diff_b).to(dtype))
    assert not base.weight.equal(before["weight"])
    assert not base.bias.equal(before["bias"])
    adapted.unmerge()
    assert base.weight.equal(before["weight"])
    assert base.bias.equal(before["bias"])
    adapted.merge_into(fresh)
    assert fresh["layer"].weight.equal(exact)
    assert fresh["layer"].bias.equal((before["bias"].float() + model["layer"].diff_b).to(dtype))


@every_spec
def test_first_values_are_those_of_seed_and_name(spec):
    def values(seed: int, names: list[str]) -> dict[str, torch.Tensor]:
        torch.manual_seed(len(names))  # what another rank's RNG may be
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.ModuleDict({name: nn.Conv2d(6, 8, 3) for name in ("a", "b", "c")})
        before = torch.get_rng_state()
        state = attach(model, dict.fromkeys(names, spec), seed).state_dict()
        assert torch.get_rng_state().equal(before), "the global RNG moved"
        return state

    alone, together, reseeded = values(7, ["b"]), values(7, ["c", "a", "b"]), values(8, ["b"])
    assert all(tensor.equal(together[name]) for name, tensor in alone.items())
    random = {n: t for n, t in alone.items() if t.count_nonzero() and "magnitude" not in n}
    assert all(not tensor.equal(reseeded[name]) for name, tensor in random.items())
    assert all(
        not tensor.equal(together[name.replace("b.", "a.", 1)]) for name, tensor in random.items()
    )
    assert random or spec.algorithm in ("OFT", "BOFT", "Full")


def test_every_kind_of_layer_is_adapted_in_the_test():
    assert {type(make()) for make, _ in LAYERS.values()} == {
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
    }
