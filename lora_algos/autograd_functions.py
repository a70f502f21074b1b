"""The passes of an adapted layer as autograd functions, from the kernel of its algorithm.

lora_algos/kernels.py explains the modes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_algos.frozen_weight import weight_values
from lora_algos.kernels import (
    WIDE_DTYPES,
    AdditiveKernel,
    Factors,
    Kernel,
    Mode,
    SavedTensors,
)
from lora_algos.layer_op import LayerOp, bias_like


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


def adapted_forward(
    kernel: Kernel,
    mode: Mode,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Factors,
) -> Tensor:
    """Return the adapted layer's output; `weight` is the stored weight.

    Under torch.compile, modes merged and dense are operations that the compiler plans."""
    if mode == "factors":
        y = kernel.autograd_forward(x, weight, bias, factors)
        if y is not None:
            return y
    elif torch.compiler.is_compiling():
        values = weight_values(weight, x.dtype)
        return merged_or_dense_forward(kernel, mode, x, values, bias_like(bias, x), factors)
    return AdaptedFunction.apply(kernel, mode, x, weight, bias, *factors)


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
    """The layer with its update: (kernel, mode, x, weight, bias, *factors) -> y.

    `weight` is the stored weight. Weight and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        mode: Mode,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *factors: Tensor,
    ):
        values = weight_values(weight, x.dtype)
        bias_values = bias_like(bias, x)
        activations: tuple[Tensor, ...] = (x,)
        if mode == "factors":
            y, activations = kernel.factors_forward(x, values, bias_values, factors)
        else:
            y = merged_or_dense_forward(kernel, mode, x, values, bias_values, factors)
        if not torch.compiler.is_compiling() and y._is_view():
            # autograd forbids in-place changes, such as relu_, of a view that is made in here
            y, activations = without_view(y, activations)
        ctx.kernel, ctx.mode, ctx.num_factors = kernel, mode, len(factors)
        ctx.input_shape, ctx.input_dtype = x.shape, x.dtype
        ctx.save_for_backward(weight, bias, *factors, *activations)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        kernel, mode, num_factors = ctx.kernel, ctx.mode, ctx.num_factors
        weight, bias, *tensors = ctx.saved_tensors
        activation, *extras = tensors[num_factors:]
        saved = SavedTensors(
            activation,
            weight_values(weight, ctx.input_dtype),
            bias,
            tuple(tensors[:num_factors]),
            tuple(extras),
            ctx.input_shape,
        )
        needs_input_grad = ctx.needs_input_grad[2]
        if not kernel.op.spatial_dims:
            grad = grad.contiguous()
        input_grad = None
        if mode == "factors":
            input_grad, grads = kernel.factors_backward(grad, saved, needs_input_grad)
        else:
            if needs_input_grad:
                input_grad = merged_or_dense_input_grad(kernel, mode, grad, saved)
            grads = kernel.merged_or_dense_grads(grad, saved)
        return None, None, input_grad, None, None, *grads, *[None] * kernel.num_constants


def without_view(
    y: Tensor,
    activations: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return a view of an output as a tensor, also among the activations."""
    tensor_of_view = y.data
    replaced = []
    for activation in activations:
        replaced.append(tensor_of_view if activation is y else activation)
    return tensor_of_view, tuple(replaced)


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
        narrow_factors = tuple(factor.to(x.dtype) for factor in factors)
        extras = kernel.add_output(y, x, narrow_factors)
        ctx.kernel, ctx.num_factors = kernel, len(factors)
        ctx.save_for_backward(*factors, x, *extras)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        tensors = ctx.saved_tensors  # read once: checkpointing unpacks them only once
        factors = tuple(tensors[: ctx.num_factors])
        x, *extras = tensors[ctx.num_factors :]
        input_grad = None
        if ctx.needs_input_grad[2]:
            is_convolution = ctx.kernel.op.spatial_dims
            layout = torch.preserve_format if is_convolution else torch.contiguous_format
            input_grad = torch.zeros_like(x, memory_format=layout)
        # additive kernels do not read the weight
        saved = SavedTensors(x, x, None, factors, tuple(extras), x.shape)
        grads = ctx.kernel.output_grads(grad.contiguous(), saved, input_grad)
        return None, grad, input_grad, *grads
