"""An adapted layer's forward and backward pass, written by hand: the frame that every algorithm's
formula stands in.

A `Kernel` states the update of a weight once, in `delta`; its fast `forward` and `backward` must
equal what autograd makes of that (tests). There are three modes, the same function up to rounding:

    factors   y = W x + h(x), the update applied to activations, factor by factor: never forms dW
    merged    y = (W + dW) x, one product; only where W + dW is fp32 or wider, or the update would be rounded away
    dense     y = W x + dW x, for other dtypes where the factors would cost more

What is saved for the backward pass is the input once, or the output for rotations, and parameters;
the rest is computed again. The base weight's gradient is never formed.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_algos.layer_op import LayerOp, rows

Mode = Literal["factors", "merged", "dense"]
Tensors = tuple[Tensor, ...]
WIDE = (torch.float32, torch.float64)
IN_CACHE = 2**22  # elements


def weight_pass(shape: torch.Size, device: torch.device) -> float:
    """What one elementwise pass over a weight costs, in products and sums of a GEMM: measured on a CPU, where a large
    new tensor is also new to the caches, and reckoned from the memory and arithmetic rates of a GPU.
    """
    size = shape.numel()
    return size * (30.0 if device.type == "cpu" and size < IN_CACHE else 100.0)


def cheapest(costs: dict[Mode, float], wide: bool) -> Mode:
    """The mode with the least cost; merging is out unless `wide`."""
    best: Mode = "dense"
    for mode, cost in costs.items():  # torch.compile does not follow min() with a key
        if cost < costs[best] and (wide or mode != "merged"):
            best = mode
    return best


@dataclass(frozen=True)
class Kernel(ABC):
    """How one layer's update is computed from its factors. `scaling` is applied in `delta` and in
    the fast passes."""

    num_constants: ClassVar[int] = 0
    """How many of the factors, the last, are not trained; the backward pass leaves them out."""

    op: LayerOp
    shape: torch.Size
    """Of the weight: (out, in / groups, *kernel)."""
    scaling: float

    @abstractmethod
    def delta(self, weight: Tensor, factors: Tensors) -> Tensor:
        """The update of `weight` (out, in, *kernel), in the factors' dtype, scaling included."""

    def whole(self, weight: Tensor, factors: Tensors) -> Tensor:
        """W + dW, in a wide dtype."""
        return torch.add(weight, self.delta(weight, factors)).to(
            weight.dtype
        )  # laid out in memory as the weight

    @abstractmethod
    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensors
    ) -> tuple[Tensor, Tensors]:
        """Mode factors. Returns the output, and what `backward` wants besides weight, bias and
        factors."""

    @abstractmethod
    def backward(
        self, grad: Tensor, saved: "Saved", input_grad: bool
    ) -> tuple[Tensor | None, Tensors]:
        """Mode factors. Returns the gradients of the input, if wanted, and of the factors."""

    def by_factors(self, factors: Tensors) -> bool:
        """Whether this layer has the mode factors."""
        return True

    def mode(self, tokens: int, wide: bool, factors: Tensors) -> Mode:
        """The cheapest mode, where there are all, for an input with `tokens` positions; `wide` if merging loses
        nothing."""
        return "factors"

    def plain(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensors
    ) -> Tensor | None:
        """Mode factors in operations that autograd knows, or None: where the hand-written passes gain less from the
        arithmetic than Python costs them. Weight and bias may be in another dtype than `x`."""
        return None

    def dense_grads(self, grad: Tensor, saved: "Saved") -> Tensors:
        """Modes merged and dense: the gradients of the factors."""
        op_grad = self.op.weight_grad(grad, saved.x, saved.weight.shape)
        trained = len(saved.factors) - self.num_constants
        with torch.enable_grad():
            leaves = tuple(factor.detach().requires_grad_() for factor in saved.factors[:trained])
            delta = self.delta(saved.weight, (*leaves, *saved.factors[trained:]))
            return torch.autograd.grad(delta, leaves, op_grad.to(delta.dtype))


@dataclass(frozen=True)
class Saved:
    """What a backward pass is given. `x` is the layer's input, or what the kernel's forward
    returned in its place."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    factors: Tensors
    kept: Tensors
    shape: torch.Size
    """Of the layer's input."""


class AdaptedLayer(torch.autograd.Function):
    """The layer with its update: (kernel, mode, x, weight, bias, *factors) -> y. Weight and bias
    are frozen."""

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
        w, b = weight.to(x.dtype), narrowed(bias, x)
        kept: Tensors = (x,)
        if mode == "factors":
            y, kept = kernel.forward(x, w, b, factors)
        else:
            y = with_delta(kernel, mode, x, w, b, factors)
        if not torch.compiler.is_compiling() and y._is_view():
            # of a view that is made here autograd allows no change in place, such as relu_ of the
            # layer's output
            whole = y.data
            y, kept = whole, tuple(whole if tensor is y else tensor for tensor in kept)
        ctx.kernel, ctx.mode, ctx.num_factors, ctx.input = (
            kernel,
            mode,
            len(factors),
            (x.shape, x.dtype),
        )
        ctx.save_for_backward(weight, bias, *factors, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        kernel, (shape, dtype) = ctx.kernel, ctx.input
        weight, bias, *rest = ctx.saved_tensors
        factors, kept = tuple(rest[: ctx.num_factors]), tuple(rest[ctx.num_factors :])
        saved = Saved(kept[0], weight.to(dtype), bias, factors, kept[1:], shape)
        grad = grad.contiguous() if not kernel.op.spatial else grad
        wants_input, dx = ctx.needs_input_grad[2], None
        if ctx.mode == "factors":
            dx, grads = kernel.backward(grad, saved, wants_input)
        else:
            if wants_input:
                dx = dense_input_grad(kernel, ctx.mode, grad, saved)
            grads = kernel.dense_grads(grad, saved)
        return None, None, dx, None, None, *grads, *[None] * kernel.num_constants


def dense_input_grad(kernel: Kernel, mode: Mode, grad: Tensor, saved: Saved) -> Tensor:
    if mode == "merged":
        return kernel.op.input_grad(grad, kernel.whole(saved.weight, saved.factors), saved.shape)
    delta = kernel.delta(saved.weight, saved.factors)
    dx = kernel.op.input_grad(grad, saved.weight, saved.shape)
    return dx.add_(kernel.op.input_grad(grad, delta.to(grad.dtype), saved.shape))


def adapted(
    kernel: Kernel, mode: Mode, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensors
) -> Tensor:
    """The adapted layer's output. Under torch.compile the dense modes are plain operations, which
    it plans itself."""
    if mode == "factors" and (y := kernel.plain(x, weight, bias, factors)) is not None:
        return y
    if mode == "factors" or not torch.compiler.is_compiling():
        return AdaptedLayer.apply(kernel, mode, x, weight, bias, *factors)
    return with_delta(kernel, mode, x, weight.to(x.dtype), narrowed(bias, x), factors)


def with_delta(
    kernel: Kernel, mode: Mode, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensors
) -> Tensor:
    """Modes merged and dense: the layer's output."""
    if mode == "merged":
        return kernel.op(x, kernel.whole(weight, factors), bias)
    return two_weights(kernel.op, x, (weight, kernel.delta(weight, factors).to(x.dtype)), bias)


def narrowed(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def two_weights(
    op: LayerOp, x: Tensor, weights: tuple[Tensor, Tensor], bias: Tensor | None
) -> Tensor:
    """The sum of a layer's outputs with two weights and one bias, rounded once where it can be.

    In bf16 an output that is rounded before a small update is added to it is the same output afterwards: what counts is
    that both products are in one sum when it is rounded.
    """
    if op.groups == 1:
        return op(torch.cat([x, x], 1 if op.spatial else -1), torch.cat(weights, 1), bias)
    return op(x, weights[0], bias).add_(op(x, weights[1]))


@dataclass(frozen=True)
class Additive(Kernel):
    """A kernel whose update is added to the base's output: y = W x + h(x)."""

    @abstractmethod
    def add(self, y: Tensor, x: Tensor, factors: Tensors) -> Tensors:
        """Adds h(x) to `y` in place. Returns small results that `grads` would otherwise compute
        again."""

    @abstractmethod
    def grads(self, grad: Tensor, saved: Saved, dx: Tensor | None) -> Tensors:
        """The gradients of the factors; adds that of the input to `dx` in place."""

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensors
    ) -> tuple[Tensor, Tensors]:
        narrow = tuple(f.to(x.dtype) for f in factors)
        if self.op.spatial or bias is not None or x.dtype in WIDE:
            y = self.op(x, weight, bias)
            return y, (x, *self.add(y, x, narrow))
        # both in one sum before it is rounded, which costs nothing where there is no bias
        y = x.new_zeros(*x.shape[:-1], self.shape[0])
        kept = self.add(y, x, narrow)
        rows(y).addmm_(rows(x), weight.T)
        return y, (x, *kept)

    def backward(
        self, grad: Tensor, saved: Saved, input_grad: bool
    ) -> tuple[Tensor | None, Tensors]:
        dx = self.op.input_grad(grad, saved.weight, saved.shape) if input_grad else None
        return dx, self.grads(grad, saved, dx)


class Branch(torch.autograd.Function):
    """An additive update alone: (kernel, y, x, *factors) -> y + h(x), for an `x` that is not what the base was
    given."""

    @staticmethod
    def forward(ctx: Any, kernel: Additive, y: Tensor, x: Tensor, *factors: Tensor):
        y = y.clone()
        ctx.kernel, ctx.num_factors = kernel, len(factors)
        ctx.save_for_backward(*factors, x, *kernel.add(y, x, tuple(f.to(x.dtype) for f in factors)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        n = ctx.num_factors
        tensors = ctx.saved_tensors  # once: checkpointing allows no second look
        factors, (x, *kept) = tuple(tensors[:n]), tensors[n:]
        layout = torch.preserve_format if ctx.kernel.op.spatial else torch.contiguous_format
        dx = torch.zeros_like(x, memory_format=layout) if ctx.needs_input_grad[2] else None
        saved = Saved(
            x, x, None, factors, tuple(kept), x.shape
        )  # additive kernels do not read the weight
        return None, grad, dx, *ctx.kernel.grads(grad.contiguous(), saved, dx)


@dataclass(frozen=True)
class DenseKernel(Kernel):
    """A kernel that always forms dW."""

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensors
    ) -> tuple[Tensor, Tensors]:
        raise AssertionError("it has no mode factors")

    def backward(
        self, grad: Tensor, saved: Saved, input_grad: bool
    ) -> tuple[Tensor | None, Tensors]:
        raise AssertionError("it has no mode factors")

    def by_factors(self, factors: Tensors) -> bool:
        return False
