"""LoHa: dW = (alpha / rank) * (w1_a @ w1_b) o (w2_a @ w2_b), o elementwise (FedPara, Hyeon-Woo et
al. 2021, arXiv 2108.06098; tensors as in LyCORIS).

Shapes, for a weight (out, in, *kernel): hada_w*_a (out, rank), hada_w*_b (rank, in * kernel). In
Tucker form: hada_t* (rank, rank, *kernel), hada_w*_a (rank, out), hada_w*_b (rank, in). w2_a starts
at zero.

An elementwise product of matrices of rank r is a matrix of rank r^2. Its factors are the row-wise
and column-wise (Khatri-Rao) products of the factors. So for small ranks the update is applied to
activations like a LoRA of rank r^2.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_algos.algorithm import Algorithm
from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.kernels import (
    AdditiveKernel,
    DeltaOnlyKernel,
    Factors,
    Gradients,
    Kernel,
    Mode,
    Prepared,
    SavedTensors,
    Term,
    cheapest,
    elementwise_cost,
)
from lora_algos.layer_op import LayerOp, scaled
from lora_algos.low_rank import (
    LowRankUpdate,
    add_low_rank,
    lora_tensors,
    low_rank_grads,
    low_rank_output,
    tucker_product,
)
from lora_algos.tensors import LayerTensors, Shapes
from lora_algos.traits import (
    FileTraits,
    Layers,
    PeftTraits,
    RowAxes,
    RowAxis,
    TensorTraits,
    Weights,
)

W1_A, W1_B, W2_A, W2_B = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
T1, T2 = "hada_t1", "hada_t2"
MAX_SAVED_SHARE = 1 / 64
"""Size of h relative to the input up to which it is saved; a larger one is computed again."""


def khatri_rao(
    w1_a: Tensor,
    w1_b: Tensor,
    w2_a: Tensor,
    w2_b: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return factors (out, r^2) and (r^2, in) whose product is (w1_a @ w1_b) o (w2_a @ w2_b)."""
    up = w1_a[:, :, None] * w2_a[:, None, :]
    down = w1_b[:, None, :] * w2_b[None, :, :]
    return up.flatten(1), down.flatten(0, 1)


def khatri_rao_grads(
    up_grad: Tensor,
    down_grad: Tensor,
    factors: Factors,
    scaling: float,
) -> Gradients:
    """Return the gradients of the four factors, given those of up and of scaling * down.

    `up_grad` (out, r^2), `down_grad` (r^2, in)."""
    w1_a, w1_b, w2_a, w2_b = factors
    down_grad = scaled(down_grad, scaling)
    w1_a_grad, w2_a_grad = row_product_grads(up_grad, w1_a, w2_a)
    w1_b_grad, w2_b_grad = row_product_grads(down_grad.T, w1_b.T, w2_b.T)
    return (
        w1_a_grad,
        w1_b_grad.T,
        w2_a_grad,
        w2_b_grad.T,
    )


def row_product_grads(
    grad: Tensor,
    first: Tensor,
    second: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of two factors (n, r), given that of their products per row (n, r^2)."""
    num_rows, rank = first.shape
    matrices = grad.reshape(num_rows, rank, rank)
    matrices = matrices.to(first.dtype)
    first_columns = first.unsqueeze(2)
    second_columns = second.unsqueeze(2)
    first_grad = torch.bmm(matrices, second_columns)
    second_grad = torch.bmm(matrices.mT, first_columns)
    return first_grad.squeeze(2), second_grad.squeeze(2)


@dataclass(frozen=True)
class Hadamard(AdditiveKernel):
    """Factors (w1_a, w1_b, w2_a, w2_b)."""

    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        """Return the update (out, in, *kernel)."""
        w1_a, w1_b, w2_a, w2_b = factors
        first = w1_a @ scaled(w1_b, self.scaling)
        second = w2_a @ w2_b
        return (first * second).view(self.shape)

    def merged_weight(self, weight: Tensor, factors: Factors) -> Tensor:
        return self.delta(weight, factors).add_(weight)

    def add_output(
        self,
        y: Tensor,
        x: Tensor,
        prepared: Prepared,
    ) -> tuple[Tensor, ...]:
        return self._small_enough(add_low_rank(self.op, y, x, self._as_low_rank(prepared)))

    def terms(self) -> tuple[Term, ...]:
        """Return the factors, w1_b times the scaling.

        The products of rank r^2 are larger than the factors, so each pass forms them again."""
        return (
            Term(0),
            Term(1, self.scaling),
            Term(2),
            Term(3),
        )

    def output(self, x: Tensor, prepared: Prepared) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, h = low_rank_output(x, self._as_low_rank(prepared))
        return y, self._small_enough(h)

    def _as_low_rank(self, prepared: Prepared) -> LowRankUpdate:
        """Return the update in its form of rank r^2, with the scaling in down."""
        w1_a, scaled_w1_b, w2_a, w2_b = prepared
        up, down = khatri_rao(w1_a, scaled_w1_b, w2_a, w2_b)
        down = down.view(-1, *self.shape[1:])
        return LowRankUpdate(up, down, up, down)

    def _small_enough(self, h: Tensor) -> tuple[Tensor, ...]:
        """Return what of h = down(x) is saved: all if it is small, else nothing."""
        is_small = h.shape[self.op.channel_axis] <= self.shape[1] * MAX_SAVED_SHARE
        return (h,) if is_small else ()

    def output_grads(
        self,
        grad: Tensor,
        saved: SavedTensors,
        input_grad: Tensor | None,
    ) -> Gradients:
        prepared = saved.prepared or self.prepare(saved.weight, saved.factors, grad.dtype)
        update = self._as_low_rank(prepared)
        h = saved.extras[0] if saved.extras else None
        x = saved.activation
        up_grad, down_grad = low_rank_grads(
            self.op,
            grad,
            x,
            update,
            input_grad,
            h,
        )
        return khatri_rao_grads(
            up_grad.flatten(1), down_grad.flatten(1), saved.factors, self.scaling
        )

    def merged_or_dense_grads(self, grad: Tensor, saved: SavedTensors) -> Gradients:
        w1_a, w1_b, w2_a, w2_b = saved.factors
        num_positions = grad.numel() // self.shape[0]
        costs = self._grad_costs(num_positions, w1_a)
        if costs.by_rank < costs.by_matrix:
            return self.output_grads(grad, saved, None)
        delta_grad = self.op.weight_grad(grad, saved.activation, self.shape)
        delta_grad = scaled(delta_grad.flatten(1).to(w1_a.dtype), self.scaling)
        first_grad = (w2_a @ w2_b).mul_(delta_grad)
        second_grad = (w1_a @ w1_b).mul_(delta_grad)
        return (
            first_grad @ w1_b.T,
            w1_a.T @ first_grad,
            second_grad @ w2_b.T,
            w2_a.T @ second_grad,
        )

    def _grad_costs(self, num_positions: int, w1_a: Tensor) -> "GradCosts":
        """Return the costs of the two ways to compute the gradients of the factors.

        In operations, for an input with that many positions."""
        rank = w1_a.shape[1]
        out, fan_in = self.shape[0], self.shape[1:].numel()
        by_rank = 4.0 * num_positions * rank**2 * (out + fan_in)
        products = out * fan_in * (2 * num_positions + 8 * rank)
        elementwise = 6 * elementwise_cost(self.shape, w1_a.device)
        return GradCosts(by_rank, products + elementwise)

    def cheapest_mode(
        self,
        num_positions: int,
        is_wide: bool,
        factors: Factors,
    ) -> Mode:
        """Return the cheapest mode. Costs are operations, in the forward and backward pass."""
        w1_a = factors[0]
        rank = w1_a.shape[1]
        out, fan_in = self.shape[0], self.shape[1:].numel()
        grad_costs = self._grad_costs(num_positions, w1_a)
        cheapest_grads = min(grad_costs.by_rank, grad_costs.by_matrix)
        # dW is formed in both passes
        elementwise = 8 * elementwise_cost(self.shape, w1_a.device)
        delta_cost = 8 * out * fan_in * rank + elementwise
        forward_cost = 2 * num_positions * rank**2 * (2 * fan_in + out)
        merged_cost = cheapest_grads + delta_cost
        second_product_cost = 4 * num_positions * out * fan_in
        costs: dict[Mode, float] = {
            "factors": grad_costs.by_rank + forward_cost,
            "merged": merged_cost,
            "dense": merged_cost + second_product_cost,
        }
        return cheapest(costs, is_wide)


@dataclass(frozen=True)
class GradCosts:
    """Costs of computing the gradients of the factors."""

    by_rank: float
    """Through the form of rank r^2."""
    by_matrix: float
    """Through the gradient of dW."""


@dataclass(frozen=True)
class TuckerHadamard(DeltaOnlyKernel):
    """Factors (w1_a, w1_b, w2_a, w2_b, t1, t2)."""

    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        """Return the update (out, in, *kernel)."""
        w1_a, w1_b, w2_a, w2_b, t1, t2 = factors
        first = tucker_product(t1, w1_a, w1_b)
        second = tucker_product(t2, w2_a, w2_b)
        return first * second * self.scaling


def row_axes(tensors: LayerTensors, num_rows: int) -> RowAxes:
    """Return the axes of the rows: the second ones in Tucker form."""
    names = [name for name in (W1_A, W2_A) if name in tensors]
    row_axis = RowAxis(1) if T1 in tensors else RowAxis(0)
    return dict.fromkeys(names, row_axis)


def weight_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of the weight.

    Without a core it is a matrix, also for convolutions."""
    a, b = shapes[W1_A], shapes[W1_B]
    if T1 not in shapes:
        return a[0], b[1]
    _, _, *kernel = shapes[T1]
    return a[1], b[1], *kernel


def to_lora(tensors: LayerTensors, weight: torch.Size) -> LayerTensors:
    """Return the LoRA of rank r^2 of the same function."""
    w1_a, w1_b = flat_product(tensors[W1_A], tensors[W1_B], tensors.get(T1))
    w2_a, w2_b = flat_product(tensors[W2_A], tensors[W2_B], tensors.get(T2))
    up, down = khatri_rao(w1_a, w1_b, w2_a, w2_b)
    scaling = LoHa.traits.scaling(tensors)
    return lora_tensors(up * scaling, down, weight)


def flat_product(
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return one of the two products as matrices (out, rank) and (rank, in * kernel)."""
    if core is None:
        return a, b
    down = torch.einsum("ij...,jn->in...", core, b)
    return a.T, down.flatten(1)


def peft_options(layers: Layers, weights: Weights) -> dict[str, Any]:
    """Return PEFT's options of a LoHa."""
    return {"use_effective_conv2d": any(T1 in tensors for tensors in layers.values())}


class LoHa(Algorithm):
    """The elementwise product of two products of thin factors."""

    name = "LoHa"
    options = ("rslora", "tucker")
    traits = TensorTraits(
        names=(W1_A, W1_B, W2_A, W2_B, T1, T2),
        detected_by=(W1_A,),
        groups=((W1_A, W1_B, W2_A, W2_B), (T1, T2)),
        needs={T1: W1_A},
        rank_axes={T1: 0, W1_B: 0},
        dropout_axes={W1_B: 0},
        starts_at_zero=(W2_A,),
        row_axes=row_axes,
        factor_pairs=((W1_A, W1_B), (W2_A, W2_B)),
        weight_shape=weight_shape,
        to_lora=to_lora,
        files=FileTraits(peft=PeftTraits("LOHA", options=peft_options)),
    )

    def supports_option(
        self,
        option: str,
        options: AdapterOptions,
        weight: torch.Size,
    ) -> bool:
        if option == "tucker" and weight[2:].numel() == 1:
            return False
        return super().supports_option(option, options, weight)

    def shapes(self, spec: LayerSpec, weight: torch.Size) -> Shapes:
        out, channels, *kernel = weight
        rank = spec.rank
        kernel_size = math.prod(kernel)
        if spec.options.tucker and kernel_size > 1:
            return {
                W1_A: (rank, out),
                W1_B: (rank, channels),
                W2_A: (rank, out),
                W2_B: (rank, channels),
                T1: (rank, rank, *kernel),
                T2: (rank, rank, *kernel),
            }
        return {
            W1_A: (out, rank),
            W1_B: (rank, channels * kernel_size),
            W2_A: (out, rank),
            W2_B: (rank, channels * kernel_size),
        }

    def read_options(self, tensors: LayerTensors) -> AdapterOptions:
        return AdapterOptions(tucker=T1 in tensors)

    def make_kernel(
        self,
        op: LayerOp,
        spec: LayerSpec,
        weight: torch.Size,
        names: Iterable[str],
    ) -> Kernel:
        if T1 in names:
            return TuckerHadamard(op, weight, spec.scaling)
        return Hadamard(op, weight, spec.scaling)

    def initialize(self, tensors: LayerTensors) -> None:
        """Fill new tensors from normal distributions, and w2_a with zeros."""
        for name, tensor in tensors.items():
            is_small = name in (W1_A, T1, T2)
            deviation = 0.1 if is_small else 1.0
            nn.init.normal_(tensor, std=deviation)
        nn.init.zeros_(tensors[W2_A])


ALGORITHM = LoHa()
