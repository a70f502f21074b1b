"""The passes of an adapted layer as autograd functions, from the kernel of its algorithm.

lora_algos/kernels.py explains the modes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_algos.frozen_weight import is_temporary, weight_values
from lora_algos.kernels import (
    WIDE_DTYPES,
    AdditiveKernel,
    Factors,
    Kernel,
    Mode,
    Prepared,
    SavedTensors,
)
from lora_algos.layer_op import LayerOp, as_matrix
from lora_algos.prepared import prepare


def choose_mode(
    kernel: Kernel,
    bypass_mode: str,
    x: Tensor,
    factors: Factors,
) -> Mode:
    """Return the mode for an input, as `bypass_mode` says.

    true: factors; false: merged or dense; auto: the cheapest. `x`: the input with its padding."""
    is_wide = x.dtype in WIDE_DTYPES
    has_factors_mode = kernel.has_factors_mode(factors)
    if bypass_mode == "true":
        return "factors" if has_factors_mode else "dense"
    if bypass_mode == "false" or not has_factors_mode:
        return "merged" if is_wide else "dense"
    num_positions = x.numel() // x.shape[kernel.op.channel_axis]
    for stride in kernel.op.stride:
        num_positions //= stride
    return kernel.cheapest_mode(num_positions, is_wide, factors)


def merged_or_dense_forward(
    kernel: Kernel,
    mode: Mode,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Factors,
) -> Tensor:
    """Modes merged and dense: return the layer's output."""
    if mode == "merged":
        return kernel.op(x, kernel.merged_weight(weight, factors), bias)
    delta = kernel.delta(weight, factors).to(x.dtype)
    return sum_of_products(kernel.op, x, (weight, delta), bias)


def sum_of_products(
    op: LayerOp,
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    bias: Tensor | None,
) -> Tensor:
    """Return the sum of a layer's outputs with two weights and one bias, rounded once if possible.

    An output that is rounded to bf16 first does not change when a small update is added to it.
    So both products must be in one sum before it is rounded."""
    if op.groups == 1:
        doubled_x = torch.cat([x, x], op.channel_axis)
        return op(doubled_x, torch.cat(weights, 1), bias)
    weight, delta = weights
    return op(x, weight, bias).add_(op(x, delta))


def merged_or_dense_input_grad(
    kernel: Kernel,
    mode: Mode,
    grad: Tensor,
    saved: SavedTensors,
) -> Tensor:
    """Modes merged and dense: return the gradient of the input."""
    op, weight, shape = kernel.op, saved.weight, saved.input_shape
    if mode == "merged":
        return op.input_grad(grad, kernel.merged_weight(weight, saved.factors), shape)
    delta = kernel.delta(weight, saved.factors)
    input_grad = op.input_grad(grad, weight, shape)
    return input_grad.add_(op.input_grad(grad, delta.to(grad.dtype), shape))


class AdaptedFunction(torch.autograd.Function):
    """The layer with its update: (kernel, mode, x, base, prepared, *factors) -> y.

    `base`: stored weight and bias, which are frozen. `prepared`: what is kept between passes; if it is
    empty, each pass prepares the factors. Kernels of Linear layers get inputs and
    gradients as matrices (tokens, channels). What the backward pass needs of the
    layer itself stays in attributes: hooks of saved tensors, as checkpointing has, would cost time
    for tensors that exist anyway. Temporary weights are saved: checkpointing drops them, and copies
    them again for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        mode: Mode,
        x: Tensor,
        base: tuple[Tensor, Tensor | None],
        prepared: Prepared,
        *factors: Tensor,
    ):
        ctx.kernel, ctx.mode, ctx.input_shape, ctx.input_dtype = kernel, mode, x.shape, x.dtype
        ctx.base, ctx.prepared, ctx.factors = base, prepared, factors
        is_linear = not kernel.op.spatial_dims
        if is_linear:
            x = as_matrix(x)
        weight, bias = values_of(base, x.dtype)
        activations: tuple[Tensor, ...] = (x,)
        if mode == "factors":
            values = prepared or prepare(kernel, weight_values(base[0]), factors, x.dtype)
            y, activations = kernel.factors_forward(x, weight, bias, values)
        else:
            y = merged_or_dense_forward(kernel, mode, x, weight, bias, factors)
        output = y
        if is_linear:
            output = y.view(*ctx.input_shape[:-1], y.shape[1])
        if not torch.compiler.is_compiling() and output._is_view():
            # autograd forbids in-place changes, such as relu_, of a view that is made in here
            output = output.data
        saved_tensors: list[Tensor | None] = []
        for activation in activations:
            saved_tensors.append(output if activation is y else activation)
        if is_temporary(base[0]):
            ctx.base = None
            saved_tensors += base
        ctx.save_for_backward(*saved_tensors)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        if torch.is_grad_enabled():
            return differentiable_once(ctx, grad)
        return adapted_backward(ctx, grad)


def values_of(
    base: tuple[Tensor, Tensor | None],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Return a stored weight and a bias in the dtype of activations."""
    weight, bias = base
    if weight.dtype is not dtype:
        weight = weight_values(weight, dtype)
    if bias is not None and bias.dtype is not dtype:
        bias = bias.to(dtype)
    return weight, bias


def adapted_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return the gradients of the arguments of AdaptedFunction."""
    kernel, mode, input_shape = ctx.kernel, ctx.mode, ctx.input_shape
    base, factors, prepared = ctx.base, ctx.factors, ctx.prepared
    activation, *extras = ctx.saved_tensors  # read once: checkpointing unpacks them only once
    if base is None:
        *extras, stored_weight, stored_bias = extras
        base = stored_weight, stored_bias
    weight, bias = values_of(base, ctx.input_dtype)
    needs_input_grad = ctx.needs_input_grad[2]
    is_linear = not kernel.op.spatial_dims
    if is_linear:
        grad, activation = as_matrix(grad.contiguous()), as_matrix(activation)
        extras = [as_matrix(extra) for extra in extras]
        input_shape = activation.shape
    if mode == "factors" and not prepared:
        prepared = prepare(kernel, weight_values(base[0]), factors, ctx.input_dtype)
    saved = SavedTensors(activation, tuple(extras), weight, bias, factors, prepared, input_shape)
    input_grad = None
    if mode == "factors":
        input_grad, grads = kernel.factors_backward(grad, saved, needs_input_grad)
    else:
        if needs_input_grad:
            input_grad = merged_or_dense_input_grad(kernel, mode, grad, saved)
        grads = kernel.merged_or_dense_grads(grad, saved)
    if input_grad is not None and is_linear:
        input_grad = input_grad.view(ctx.input_shape)
    return None, None, input_grad, None, None, *grads, *[None] * kernel.num_constants


differentiable_once = once_differentiable(adapted_backward)
"""Raises an error when a gradient is differentiated itself; costs time in each backward pass."""


class AdditiveFunction(torch.autograd.Function):
    """An additive update alone: (kernel, y, x, *factors) -> y + h(x).

    WHEN: `x` is not the input of the base, because elements of it are dropped."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: AdditiveKernel,
        y: Tensor,
        x: Tensor,
        *factors: Tensor,
    ):
        y = y.clone()
        # additive kernels do not read the weight
        extras = kernel.add_output(y, x, prepare(kernel, x, factors, x.dtype))
        ctx.kernel, ctx.factors = kernel, factors
        ctx.save_for_backward(x, *extras)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, *extras = ctx.saved_tensors
        input_grad = None
        if ctx.needs_input_grad[2]:
            is_convolution = ctx.kernel.op.spatial_dims
            layout = torch.preserve_format if is_convolution else torch.contiguous_format
            input_grad = torch.zeros_like(x, memory_format=layout)
        prepared = prepare(ctx.kernel, x, ctx.factors, x.dtype)
        saved = SavedTensors(x, tuple(extras), x, None, ctx.factors, prepared, x.shape)
        grads = ctx.kernel.output_grads(grad.contiguous(), saved, input_grad)
        return None, grad, input_grad, *grads
