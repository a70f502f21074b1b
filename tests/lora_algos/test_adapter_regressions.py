"""Errors that other trainers have in their formulas: one test each, named after the error."""

import math

import pytest
import torch
from helpers.adapter_cases import closed_form, in_double, model_of, randomized, spec_of
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import attach


def trained(algorithm: str, **options) -> AdaptedModel:
    model, _ = model_of("Linear")
    return randomized(attach(model, {"layer": spec_of(algorithm, **options)}, seed=0))


def first_values(algorithm: str, **options) -> dict[str, Tensor]:
    model = nn.ModuleDict({"layer": nn.Conv2d(96, 128, 3)})
    state = attach(model, {"layer": spec_of(algorithm, rank=16, **options)}, seed=0).state_dict()
    return {name.removeprefix("layer."): tensor for name, tensor in state.items()}


def test_tucker_loha_gradients_are_not_of_the_other_side():
    """PEFT and ComfyUI chain w1_a with the second core."""
    adapted, layer, x = in_double("Conv2d", spec_of("LoHa", tucker=True))
    tensors = {name.removeprefix("layer."): p for name, p in adapted.named_parameters().items()}
    layer(x).square().sum().backward()
    weight = layer.base_layer.weight
    expected = (
        layer.op(x, weight + closed_form(tensors, layer.spec, weight), layer.base_layer.bias)
        .square()
        .sum()
    )
    for name in ("hada_w1_a", "hada_w2_a"):
        (right,) = torch.autograd.grad(expected, tensors[name], retain_graph=True)
        torch.testing.assert_close(tensors[name].grad, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("algorithm", ["LoHa", "LoKr", "LoRA", "GLoRA"])
def test_merging_applies_the_scale_once(algorithm):
    """LyCORIS' LoHa and LoKr apply alpha / rank twice when they merge."""
    adapted = trained(algorithm, rank=1, alpha=3.0)
    (layer,) = adapted.layers().values()
    base, delta = layer.base_layer.weight.clone(), layer.delta_weight()
    adapted.merge()
    torch.testing.assert_close(layer.base_layer.weight - base, delta, rtol=1e-4, atol=1e-6)


def test_alpha_of_lokr_means_nothing_where_no_factor_has_a_rank():
    """PEFT scales these by alpha / rank, and all that load the file do not."""
    updates = [
        dict(trained("LoKr", alpha=alpha, full_matrix=True).deltas())["layer"]
        for alpha in (1.0, 64.0)
    ]
    assert updates[0].equal(updates[1])
    updates = [
        dict(trained("LoKr", rank=1, alpha=alpha).deltas())["layer"] for alpha in (1.0, 64.0)
    ]
    torch.testing.assert_close(updates[1], 64 * updates[0])


@pytest.mark.parametrize("algorithm", ["OFT", "BOFT"])
@pytest.mark.parametrize("mode", ["true", "false", "auto"])
def test_a_rotation_leaves_the_bias_alone(algorithm, mode):
    """ComfyUI and LyCORIS rotate it in bypass mode, so that the mode changes what is learned."""
    adapted = trained(algorithm)
    (layer,) = adapted.layers().values()
    layer.spec = type(layer.spec)(**{**vars(layer.spec), "bypass_mode": mode})
    assert layer.delta_weight().norm() > 0.1
    torch.testing.assert_close(
        layer(torch.zeros(2, 12)), layer.base_layer.bias.expand(2, -1), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("algorithm", ["OFT", "BOFT"])
def test_a_rotation_keeps_norms_and_angles(algorithm):
    """PEFT's five Neumann terms are no rotation."""
    _, layer, _ = in_double("Linear", spec_of(algorithm))
    before, change = layer.base_layer.weight, layer.delta_weight()
    torch.testing.assert_close(
        (before + change).T @ (before + change), before.T @ before, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("algorithm", ["LoRA", "LoHa", "LoKr", "GLoRA"])
def test_alpha_is_not_trained(algorithm):
    """ComfyUI's is a parameter."""
    assert not [name for name in trained(algorithm).named_parameters() if "alpha" in name]


def test_loha_starts_with_the_deviations_not_the_means_of_the_paper():
    """ComfyUI gives normal_ the deviation as a mean, and its steps are sqrt(rank) times too strong."""
    state = first_values("LoHa")
    for name, deviation in (("hada_w1_a", 0.1), ("hada_w1_b", 1.0), ("hada_w2_b", 1.0)):
        assert abs(state[name].mean()) < 0.02 * max(1, deviation)
        assert state[name].std().item() == pytest.approx(deviation, rel=0.05)
    assert state["hada_w2_a"].count_nonzero() == 0


def test_more_rank_is_more_capacity_in_lokr():
    """In ComfyUI the rank of a LoKr is its factor, and more of it may be less to train."""
    sizes = []
    for rank in (1, 2, 4, 8):
        model = nn.ModuleDict({"layer": nn.Linear(320, 320)})
        adapted = attach(model, {"layer": spec_of("LoKr", rank=rank)}, seed=0)
        sizes.append(sum(p.numel() for p in adapted.named_parameters().values()))
    assert sizes == sorted(set(sizes))


def test_lora_starts_as_peft_and_kohya_start():
    """ComfyUI has the zeros in down."""
    state = first_values("LoRA")
    bound = 1 / math.sqrt(96 * 9)
    assert state["lora_up.weight"].count_nonzero() == 0
    assert 0.98 * bound < state["lora_down.weight"].abs().max() <= bound


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_pefts_own(rslora):
    base = nn.Linear(12, 24)
    adapted = randomized(
        attach(nn.ModuleDict({"layer": base}), {"layer": spec_of("LoRA", rslora=rslora)}, seed=0)
    )
    peft = PeftLinear(
        base, "default", config=LoraConfig(r=3, lora_alpha=5, use_rslora=rslora), r=3, lora_alpha=5
    )
    tensors = adapted.named_parameters()
    with torch.no_grad():
        peft.lora_A["default"].weight.copy_(tensors["layer.lora_down.weight"])
        peft.lora_B["default"].weight.copy_(tensors["layer.lora_up.weight"])
    x = torch.randn(5, 12)
    torch.testing.assert_close(adapted.model["layer"](x), peft(x), rtol=1e-5, atol=1e-5)


def test_dora_divides_by_the_norm_of_what_it_scales():
    """ComfyUI and Forge divide by that of the base, A1111 takes it over the inputs."""
    _, layer, _ = in_double("Linear", spec_of("DoRA"))
    norms = (layer.base_layer.weight + layer.delta_weight()).norm(dim=1)
    torch.testing.assert_close(
        norms,
        layer.update_tensors()["lora_magnitude_vector"].flatten().abs(),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("algorithm", ["DoRA", "OFT", "GLoRA", "Full"])
def test_a_bf16_base_with_an_fp32_adapter_runs(algorithm):
    """LyCORIS' DoRA and GLoRA fail on the dtypes."""
    model, x = model_of("Linear", torch.bfloat16)
    adapted = randomized(attach(model, {"layer": spec_of(algorithm)}, seed=0))
    model["layer"](x).float().sum().backward()
    assert {p.grad.dtype for p in adapted.named_parameters().values()} == {torch.float32}


def test_pissa_leaves_the_base_as_it_is():
    """PEFT takes the first product out of the weight, in the weight's dtype: the base is then another model's."""
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = model_of("Linear", dtype)
        before = model["layer"].weight.clone()
        (layer,) = attach(model, {"layer": spec_of("LoRA", init="pissa")}, seed=0).layers().values()
        assert layer.base_layer.weight.equal(before)
        assert layer.constants()["initial_up"].norm() > 0.1
