"""The forward and backward pass of an adapted layer, written by hand: the frame of every algorithm.

A `Kernel` states the update of a weight once, in `delta`. Its fast passes must equal what autograd
makes of `delta`; tests compare them. There are three modes, the same function up to rounding:

    factors   y = W x + h(x): the update is applied to activations, factor by factor; dW is never formed
    merged    y = (W + dW) x: one product; only in fp32 or wider, where W + dW does not round dW away
    dense     y = W x + dW x: for narrower dtypes, where the factors would cost more

A backward pass saves the input once, or the output for rotations. It computes everything else again.
The gradient of the base weight is never formed.

What follows from the factors alone, such as a narrower dtype, is prepared once per step: `prepare`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lora_algos.layer_op import LayerOp, as_matrix, scaled

Mode = Literal["factors", "merged", "dense"]
Factors = tuple[Tensor, ...]
"""Tensors that a kernel computes with, in an order that each kernel states."""
Gradients = tuple[Tensor, ...]
"""Gradients of factors, in their order, in any dtype."""
Prepared = tuple[Tensor, ...]
"""Tensors that follow from factors and weight, in an order that each kernel states."""
WIDE_DTYPES = (torch.float32, torch.float64)
MAX_CACHED_ELEMENTS = 2**22
"""Size of a new tensor up to which a CPU keeps it in its caches."""


class Term(NamedTuple):
    """A factor times a number."""

    factor: int
    """Index of the factor."""
    scale: float = 1.0


def multiples(factors: Factors, terms: tuple[Term, ...], dtype: torch.dtype) -> Prepared:
    """Return the terms of the factors in `dtype`. Equal terms are the same tensor."""
    values: dict[Term, Tensor] = {}
    for term in terms:
        if term not in values:
            multiple = scaled(factors[term.factor], term.scale)
            values[term] = multiple.to(dtype)
    return tuple(values[term] for term in terms)


def elementwise_cost(shape: torch.Size, device: torch.device) -> float:
    """Return the cost of one elementwise pass over a weight, in operations of a matrix product.

    The factors are measured on a CPU and estimated from memory and arithmetic rates for a GPU."""
    num_elements = shape.numel()
    is_cached = device.type == "cpu" and num_elements < MAX_CACHED_ELEMENTS
    return num_elements * (30.0 if is_cached else 100.0)


def cheapest(costs: dict[Mode, float], is_wide: bool) -> Mode:
    """Return the mode with the lowest cost; mode merged only if `is_wide`."""
    best: Mode = "dense"
    for mode, cost in costs.items():  # torch.compile does not follow min() with a key
        if cost < costs[best] and (is_wide or mode != "merged"):
            best = mode
    return best


@dataclass(frozen=True)
class Kernel(ABC):
    """Computation of one layer's update from its factors."""

    num_constants: ClassVar[int] = 0
    """Number of factors, the last ones, that are not trained and get no gradient."""

    op: LayerOp
    shape: torch.Size
    """Shape of the weight: (out, in / groups, *kernel)."""
    scaling: float
    """Factor of the update; `delta` and the fast passes apply it."""

    @abstractmethod
    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        """Return the update of `weight` (out, in, *kernel), scaled, in the factors' dtype."""

    def merged_weight(self, weight: Tensor, factors: Factors) -> Tensor:
        """Mode merged: return W + dW, in a wide dtype and the memory layout of the weight."""
        return torch.add(weight, self.delta(weight, factors)).to(weight.dtype)

    def terms(self) -> tuple[Term, ...]:
        """Mode factors: return what the passes compute with, if these are multiples of factors.

        Such tensors are prepared for all layers at once. Other kernels override `prepare`."""
        return ()

    def prepare(self, weight: Tensor, factors: Factors, dtype: torch.dtype) -> Prepared:
        """Mode factors: return what the passes compute with, for activations of `dtype`.

        WHEN: a factor has changed. No gradient flows."""
        return multiples(factors, self.terms(), dtype)

    @abstractmethod
    def factors_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        prepared: Prepared,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Mode factors: return the output, and the activations for `factors_backward`.

        The first activation is the input, or what replaces it."""

    @abstractmethod
    def factors_backward(
        self,
        grad: Tensor,
        saved: "SavedTensors",
        needs_input_grad: bool,
    ) -> tuple[Tensor | None, Gradients]:
        """Mode factors: return the gradients of the input, if needed, and of the factors."""

    def has_factors_mode(self, factors: Factors) -> bool:
        """Return whether this layer can be computed in mode factors."""
        return True

    def cheapest_mode(
        self,
        num_positions: int,
        is_wide: bool,
        factors: Factors,
    ) -> Mode:
        """Return the cheapest mode for an input with that many positions.

        WHEN: the layer has all modes. `is_wide`: mode merged loses no precision."""
        return "factors"

    def merged_or_dense_grads(self, grad: Tensor, saved: "SavedTensors") -> Gradients:
        """Modes merged and dense: return the gradients of the factors."""
        delta_grad = self.op.weight_grad(grad, saved.activation, saved.weight.shape)
        num_trained = len(saved.factors) - self.num_constants
        constants = saved.factors[num_trained:]
        with torch.enable_grad():
            leaves = tuple(f.detach().requires_grad_() for f in saved.factors[:num_trained])
            delta = self.delta(saved.weight, (*leaves, *constants))
            return torch.autograd.grad(delta, leaves, delta_grad.to(delta.dtype))


class SavedTensors(NamedTuple):
    """Tensors that a forward pass leaves for the backward pass."""

    activation: Tensor
    """The layer's input, or what `factors_forward` returned instead."""
    extras: tuple[Tensor, ...]
    """Further results of `factors_forward`."""
    weight: Tensor
    bias: Tensor | None
    factors: Factors
    prepared: Prepared
    """Result of `prepare`; may be empty in modes merged and dense."""
    input_shape: torch.Size


@dataclass(frozen=True)
class AdditiveKernel(Kernel):
    """A kernel whose update is added to the output of the base: y = W x + h(x)."""

    @abstractmethod
    def add_output(
        self,
        y: Tensor,
        x: Tensor,
        prepared: Prepared,
    ) -> tuple[Tensor, ...]:
        """Add h(x) to `y` in place. Return small results that `output_grads` can use again."""

    @abstractmethod
    def output_grads(
        self,
        grad: Tensor,
        saved: SavedTensors,
        input_grad: Tensor | None,
    ) -> Gradients:
        """Return the gradients of the factors in h(x); add that of the input to `input_grad`."""

    def output(self, x: Tensor, prepared: Prepared) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return h(x) of a Linear layer as a new tensor, and the small results."""
        y = x.new_zeros(*x.shape[:-1], self.shape[0])
        return y, self.add_output(y, x, prepared)

    def factors_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        prepared: Prepared,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.op.spatial_dims or bias is not None or x.dtype in WIDE_DTYPES:
            y = self.op(x, weight, bias)
            extras = self.add_output(y, x, prepared)
            return y, (x, *extras)
        # without a bias both products can be in one sum before it is rounded, at no cost
        y, extras = self.output(x, prepared)
        as_matrix(y).addmm_(as_matrix(x), weight.T)
        return y, (x, *extras)

    def factors_backward(
        self,
        grad: Tensor,
        saved: SavedTensors,
        needs_input_grad: bool,
    ) -> tuple[Tensor | None, Gradients]:
        input_grad = None
        if needs_input_grad:
            input_grad = self.op.input_grad(grad, saved.weight, saved.input_shape)
        return input_grad, self.output_grads(grad, saved, input_grad)


@dataclass(frozen=True)
class DeltaOnlyKernel(Kernel):
    """A kernel without mode factors: it always forms dW."""

    def factors_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        prepared: Prepared,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        raise AssertionError("this kernel has no mode factors")

    def factors_backward(
        self,
        grad: Tensor,
        saved: SavedTensors,
        needs_input_grad: bool,
    ) -> tuple[Tensor | None, Gradients]:
        raise AssertionError("this kernel has no mode factors")

    def has_factors_mode(self, factors: Factors) -> bool:
        return False
