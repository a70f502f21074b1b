"""The hand-written forward and backward passes are what autograd makes of the closed form, in every mode."""

from collections.abc import Callable

import pytest
import torch
from helpers.adapter_cases import (
    LAYERS,
    closed_form,
    every_algorithm,
    every_kind,
    every_mode,
    every_spec,
    in_double,
    in_mode,
    two_kinds,
)  # fmt: skip
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lora_algos.adapted_model import AdaptedModel
from lora_algos.adapter import AdapterLayer

MODES = ("true", "false", "auto")


def trained(adapted: AdaptedModel) -> dict[str, Tensor]:
    return {name.removeprefix("layer."): p for name, p in adapted.all_parameters().items()}


def dense(adapted: AdaptedModel, layer: AdapterLayer, x: Tensor) -> Tensor:
    """The layer's output with W + dW, dW by the closed form: torch's own layer, and autograd's own gradients."""
    tensors = {**trained(adapted), **layer.constants()}
    weight = layer.base_layer.weight.detach()
    return functional_call(
        layer.base_layer, {"weight": weight + closed_form(tensors, layer.spec, weight)}, (x,)
    )


def gradients(y: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, inputs, grad))


def compare(actual: list[Tensor], expected: list[Tensor], size: float = 1e-10) -> None:
    """Relative to the largest gradient of each tensor."""
    for mine, other in zip(actual, expected, strict=True):
        assert mine.shape == other.shape
        assert other.norm() > 0
        assert (mine - other).norm() <= size * other.norm()


def check(
    spec,
    kind: str,
    prepare: Callable[[Tensor], Tensor],
    modes: tuple[str, ...] = MODES,
    of_grad=None,
) -> None:
    """Output and all gradients, for the input that `prepare` makes and the output gradient that `of_grad` makes."""
    adapted, layer, x = in_double(kind, spec)
    x = prepare(x).requires_grad_()
    inputs = [x, *trained(adapted).values()]
    y = dense(adapted, layer, x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    grad = grad if of_grad is None else of_grad(grad)
    expected = gradients(y, inputs, grad)
    for mode in modes:
        layer.spec = in_mode(spec, mode)
        actual = layer(x)
        torch.testing.assert_close(actual, y, rtol=0, atol=1e-10)
        compare(gradients(actual, inputs, grad), expected)


@every_kind
@every_spec
def test_passes_are_those_of_the_closed_form(spec, kind):
    check(spec, kind, lambda x: x)


@every_spec
@pytest.mark.parametrize(
    "kind", ["Conv2d", "Conv2d 1x1", "Conv2d circular", "Conv2d groups", "Conv3d"]
)
def test_channels_last_input_and_gradient(spec, kind):
    layout = torch.channels_last_3d if kind == "Conv3d" else torch.channels_last

    def of(x: Tensor) -> Tensor:
        return x.detach().contiguous(memory_format=layout)

    check(spec, kind, of)
    check(spec, kind, of, of_grad=of)
    check(spec, kind, lambda x: x, of_grad=of)


@every_spec
@pytest.mark.parametrize(
    "kind", ["Linear", "Linear without bias", "Conv1d", "Conv2d", "Conv2d groups"]
)
def test_input_and_gradient_of_any_strides(spec, kind):
    def strided(x: Tensor) -> Tensor:
        """The same values, every other element in memory, the first and the last dimension exchanged."""
        wide = torch.zeros(*x.transpose(0, -1).shape, 2, dtype=x.dtype)
        wide[..., 0] = x.transpose(0, -1)
        result = wide[..., 0].transpose(0, -1)
        assert not result.is_contiguous()
        assert result.equal(x)
        return result

    check(spec, kind, strided)
    check(spec, kind, strided, of_grad=strided)
    check(spec, kind, lambda x: x, of_grad=lambda grad: grad[:1].expand(grad.shape))
    check(spec, kind, lambda x: x, of_grad=lambda grad: grad.flatten()[0].expand(grad.shape))


@every_spec
@pytest.mark.parametrize(
    "kind", ["Conv1d", "Conv2d", "Conv2d circular", "Conv2d same", "Conv2d groups", "Conv3d"]
)
def test_input_without_a_batch(spec, kind):
    check(spec, kind, lambda x: x[0].clone())


@every_spec
def test_vector_and_image_of_tokens(spec):
    check(spec, "Linear", lambda x: x[0, 0].clone())
    check(spec, "Linear", lambda x: torch.stack([x, -x]).clone())


@every_spec
@two_kinds
@every_mode
def test_gradcheck(spec, kind, mode, monkeypatch):
    adapted, layer, x = in_double(kind, spec)
    layer.spec = in_mode(spec, mode)
    if spec.algorithm == "DoRA":
        # no gradient flows through the norm, so nor may a change of the factors
        kernel, factors = layer.kernel, layer.factors(dict(layer.update_tensors()))
        norms = kernel.merged_norms(layer.base_layer.weight, factors).detach()
        monkeypatch.setattr(type(kernel), "merged_norms", lambda *_: norms)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters() if p.requires_grad]
    assert len(names) == len(adapted.named_parameters())

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *values), fast_mode=True)


@every_spec
@two_kinds
@every_mode
def test_only_what_needs_a_gradient_gets_one(spec, kind, mode):
    adapted, layer, x = in_double(kind, spec)
    tensors = trained(adapted)
    expected = dict(
        zip(
            tensors,
            gradients(dense(adapted, layer, x).square().sum(), [*tensors.values()], None),
            strict=True,
        )
    )
    layer.spec = in_mode(spec, mode)
    # an input that needs none, then all but one factor, then each factor alone
    compare(gradients(layer(x).square().sum(), [*tensors.values()], None), [*expected.values()])
    for alone in tensors:
        for name, tensor in tensors.items():
            tensor.requires_grad_(name == alone)
        compare(gradients(layer(x).square().sum(), [tensors[alone]], None), [expected[alone]])
    for tensor in tensors.values():
        tensor.requires_grad_(False)
    assert not layer(x).requires_grad
    y = layer(x.requires_grad_())
    compare(
        gradients(y.square().sum(), [x], None),
        gradients(dense(adapted, layer, x).square().sum(), [x], None),
    )


@every_spec
@two_kinds
def test_without_grad_mode(spec, kind):
    adapted, layer, x = in_double(kind, spec)
    expected = dense(adapted, layer, x)
    for mode in MODES:
        layer.spec = in_mode(spec, mode)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                y = layer(x)
                assert not y.requires_grad
                torch.testing.assert_close(y, expected.detach(), rtol=0, atol=1e-11)


@every_spec
@two_kinds
@every_mode
def test_under_checkpointing(spec, kind, mode):
    adapted, layer, x = in_double(kind, spec)
    layer.spec = in_mode(spec, mode)
    inputs = [x.requires_grad_(), *trained(adapted).values()]
    plain = layer(x).sin()
    recomputed = checkpoint(lambda x: layer(x).sin(), x, use_reentrant=False)
    assert recomputed.equal(plain)
    grad = torch.ones_like(plain)
    for mine, other in zip(
        gradients(recomputed, inputs, grad), gradients(plain, inputs, grad), strict=True
    ):
        assert mine.equal(other)


@every_algorithm
@two_kinds
@every_mode
def test_a_second_derivative_is_refused(spec, kind, mode):
    """The backward pass is not written to be differentiated: an error, where the result would be silently wrong."""
    adapted, layer, x = in_double(kind, spec)
    layer.spec = in_mode(spec, mode)
    tensors = [*trained(adapted).values()]
    first = torch.autograd.grad(layer(x).square().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(grad.square().sum() for grad in first).backward()


def test_every_kind_is_in_the_table():
    assert {"Linear", "Conv1d", "Conv2d", "Conv3d"} <= LAYERS.keys()
