"""Empty batches, other dtypes, layouts and devices, changes in place, other weights, and other programs' switches."""

import copy
import math

import pytest
import torch
from helpers.adapter_cases import (
    SPECS,
    every_algorithm,
    every_kind,
    every_mode,
    every_spec,
    in_mode,
    model_of,
    randomized,
    spec_of,
    two_kinds,
)  # fmt: skip
from torch import Tensor, nn

from common.errors import AdapterError
from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import attach
from lora_algos.config import LayerSpec
from lora_algos.targets import adaptable_layers

FLOAT8 = torch.float8_e4m3fn


def trained(
    kind: str, spec: LayerSpec, dtype: torch.dtype = torch.float32
) -> tuple[AdaptedModel, Tensor]:
    model, x = model_of(kind, dtype)
    return randomized(attach(model, {"layer": spec}, seed=0), size=0.1), x


@every_kind
@every_spec
def test_an_empty_batch_has_an_empty_answer(spec, kind):
    for mode in ("true", "false", "auto"):
        adapted, x = trained(kind, in_mode(spec, mode))
        x = x[:0].requires_grad_()
        y = adapted.model["layer"](x)
        assert y.shape == adapted.layers()["layer"].base_layer(x).shape
        y.sum().backward()
        assert all(
            p.grad is None or not p.grad.count_nonzero()
            for p in adapted.named_parameters().values()
        )


@every_spec
@every_mode
def test_an_answer_of_a_linear_layer_may_be_changed_in_place(spec, mode):
    adapted, x = trained("Linear", in_mode(spec, mode))
    layer = adapted.model["layer"]
    expected = torch.autograd.grad(layer(x).relu().sum(), [*adapted.named_parameters().values()])
    y = layer(x)
    if spec.algorithm in ("DoRA", "OFT", "BOFT") and mode != "false":
        # these keep their output, and autograd says so
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.mul_(2).sum().backward()
        return
    y.relu_().sum().backward()
    for parameter, grad in zip(adapted.named_parameters().values(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@every_spec
@two_kinds
@every_mode
def test_parameters_in_bf16_train(spec, kind, mode):
    """As FSDP casts them, or model.to(bfloat16) does."""
    adapted, x = trained(kind, in_mode(spec, mode))
    expected = adapted.model["layer"](x)
    adapted.model.bfloat16()
    y = adapted.model["layer"](x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.03 * expected.norm()
    y.float().square().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.bfloat16
        for p in adapted.named_parameters().values()
    )


@every_spec
@every_kind
@every_mode
def test_a_forward_pass_without_values(spec, kind, mode):
    if spec.options.init.startswith("pissa_niter"):
        pytest.skip("svd_lowrank reads values")
    model, x = model_of(kind)
    expected = model["layer"](x).shape
    adapted = attach(model.to("meta"), {"layer": in_mode(spec, mode)}, seed=0)
    y = model["layer"](x.to("meta").requires_grad_())
    assert y.is_meta
    assert y.shape == expected
    y.sum().backward()
    assert all(p.grad.is_meta for p in adapted.named_parameters().values())


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6)])
def test_a_norm_without_values(norm):
    model = nn.ModuleDict({"norm": norm}).to("meta")
    attach(model, {"norm": LayerSpec(algorithm="Full", bias=True)}, seed=0)
    assert model["norm"](torch.randn(2, 6, device="meta")).is_meta


@every_spec
@two_kinds
@every_mode
def test_a_base_stored_in_float8(spec, kind, mode):
    model, x = model_of(kind)
    model.to(FLOAT8)
    wide = copy.deepcopy(model).float()
    if kind == "Linear" and spec.options.init not in ("default", "gaussian"):
        with pytest.raises(
            AdapterError, match=r"the base has dtype torch.float8\w+; expected fp32, bf16 or fp16"
        ):
            attach(model, {"layer": in_mode(spec, mode)}, seed=0)
        return
    adapted = randomized(attach(model, {"layer": in_mode(spec, mode)}, seed=0), size=0.1)
    layer = adapted.layers()["layer"]
    exact = wide["layer"].weight + layer.delta_weight()
    expected = torch.func.functional_call(wide["layer"], {"weight": exact}, (x,))
    for given in (torch.float32, torch.bfloat16):
        y = layer(x.to(given))
        assert y.dtype == given
        assert (y.float() - expected).norm() < 0.02 * expected.norm()
    y.float().square().sum().backward()
    with torch.no_grad():
        before = layer.base_layer.weight.float()
        adapted.merge()
        assert layer.base_layer.weight.float().equal(exact.to(FLOAT8).float())
        adapted.unmerge()
        assert layer.base_layer.weight.float().equal(before)
        adapted.merge_into(wide)
        torch.testing.assert_close(wide["layer"].weight, exact, rtol=1e-4, atol=1e-5)


@every_spec
@every_mode
@pytest.mark.parametrize("kind", ["Conv2d", "Conv2d 1x1", "Conv2d groups"])
def test_an_adapted_model_may_be_laid_out_anew(spec, kind, mode):
    adapted, x = trained(kind, in_mode(spec, mode))
    expected = adapted.model["layer"](x)
    grads = torch.autograd.grad(expected.sin().sum(), [*adapted.named_parameters().values()])
    adapted.model.to(memory_format=torch.channels_last)
    y = adapted.model["layer"](x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    again = torch.autograd.grad(y.sin().sum(), [*adapted.named_parameters().values()])
    for mine, other in zip(again, grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    fresh, _ = model_of(kind)
    adapted.merge_into(fresh)
    torch.testing.assert_close(fresh["layer"](x), expected, rtol=1e-4, atol=1e-4)


@every_algorithm
@torch.no_grad()
def test_other_weights_of_the_base_may_be_loaded_later(spec):
    adapted, x = trained("Linear", spec)
    state = adapted.model.state_dict()
    other = {k: t * 3 + 0.1 if k.endswith("base_layer.weight") else t for k, t in state.items()}
    adapted.model.load_state_dict(other)
    layer = adapted.layers()["layer"]
    plain = copy.deepcopy(layer.base_layer)
    plain.weight += layer.algorithm.delta(layer.file_tensors(), plain.weight.clone())
    for mode in ("true", "false", "auto"):
        layer.spec = in_mode(spec, mode)
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-4)


@every_algorithm
@torch.no_grad()
def test_a_weight_that_two_layers_share_is_restored(spec):
    model = nn.ModuleDict({"a": nn.Linear(12, 24), "b": nn.Linear(12, 24)})
    model["b"].weight = model["a"].weight
    adapted = randomized(attach(model, dict.fromkeys(model, spec), seed=0))
    before = model["a"].base_layer.weight.clone()
    adapted.merge()
    assert not model["a"].base_layer.weight.equal(before)
    adapted.unmerge()
    assert model["a"].base_layer.weight.equal(before)


@every_algorithm
def test_an_inference_tensor_may_come_after(spec):
    adapted, x = trained("Linear", spec, torch.bfloat16)
    with torch.inference_mode():
        x = torch.randn(2, 12)
        expected = adapted.model["layer"](x)
    with torch.no_grad():
        assert adapted.model["layer"](x).equal(expected)
    adapted.model.requires_grad_(False)
    assert adapted.model["layer"](x).equal(expected)


class Scaled(nn.Linear):
    """A Linear layer of another computation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Standardised(nn.Conv2d):
    """A convolution of another computation."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Renamed(nn.Linear):
    """A Linear layer by another name."""


def test_layers_with_a_computation_of_their_own_are_left_alone():
    model = nn.ModuleDict({
        "scaled": Scaled(4, 4), "standardised": Standardised(4, 4, 3), "renamed": Renamed(4, 4),
        "attention": nn.MultiheadAttention(4, 2), "plain": nn.Conv1d(4, 4, 3),
    })  # fmt: skip
    assert {*adaptable_layers(model)} == {"renamed", "plain"}


@pytest.mark.parametrize("algorithm", ["LoRA", "DoRA"])
def test_pefts_switches_are_refused_not_ignored(algorithm):
    adapted, _ = trained("Linear", spec_of(algorithm))
    layer = adapted.model["layer"]
    for switch in (
        lambda: layer.enable_adapters(False), lambda: layer.scale_layer(0.5), lambda: layer.unscale_layer(),
        lambda: layer.set_scale("default", 2.0), lambda: layer.delete_adapter("default"),
        lambda: layer.merge(safe_merge=True), lambda: layer.merge(adapter_names=["default"]),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match="do not follow PEFT's switches"):
            switch()


@every_spec
@pytest.mark.parametrize("kind", ["Linear", "Conv2d groups"])
@torch.no_grad()
def test_module_dropout_drops_the_bias_too(spec, kind):
    options = copy.copy(spec.options)
    object.__setattr__(options, "module_dropout", 0.5)
    adapted, x = trained(kind, LayerSpec(spec.rank, spec.alpha, spec.algorithm, options, bias=True))
    layer = adapted.layers()["layer"]
    base, whole = layer.base_layer(x), layer.eval()(x)
    layer.train()
    kept = []
    for seed in range(12):
        torch.manual_seed(seed)
        y = layer(x)
        kept.append(bool((y - base).norm() > (y - whole).norm()))
        torch.testing.assert_close(y, whole if kept[-1] else base, rtol=0, atol=1e-5)
    assert 2 < sum(kept) < 10


def test_module_dropout_drops_a_norms_whole_change():
    model = nn.ModuleDict({"norm": nn.LayerNorm(6)})
    options = copy.copy(SPECS["Full"].options)
    object.__setattr__(options, "module_dropout", 1 - 1e-9)
    randomized(
        attach(model, {"norm": LayerSpec(algorithm="Full", options=options, bias=True)}, seed=0)
    )
    x = torch.randn(4, 6)
    assert model["norm"](x).equal(model["norm"].base_layer(x))
    assert math.isfinite(float(model["norm"].eval()(x).sum()))


def test_a_norm_before_everything_else_is_trained_channels_last():
    """Its input has no gradient; torch's own backward pass crashes on CPUs then, and ends the process."""
    model = nn.Sequential(nn.GroupNorm(8, 16), nn.Conv2d(16, 4, 1)).to(
        memory_format=torch.channels_last
    )
    adapted = attach(model, {name: LayerSpec(2, 2.0, "Full") for name in ("0", "1")}, 0)
    x = torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last)
    model(x).square().sum().backward()
    assert adapted.named_parameters()["0.diff"].grad.abs().sum() > 0
