"""LoHa: dW = (alpha / rank) * (w1_a @ w1_b) o (w2_a @ w2_b), o elementwise (FedPara, Hyeon-Woo et
al. 2021, arXiv 2108.06098; tensors as in LyCORIS).

Shapes, for a weight (out, in, *kernel): hada_w*_a (out, rank), hada_w*_b (rank, in * kernel). In
Tucker form hada_t* (rank, rank, *kernel), hada_w*_a (rank, out), hada_w*_b (rank, in). w2_a starts
at zero.

An elementwise product of rank-r matrices is a matrix of rank r^2 whose factors are the row-wise and
column-wise (Khatri-Rao) products of theirs, so for small ranks the update is applied to activations
like a LoRA of rank r^2.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_algos.adapter import OwnAdapter
from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.kernels import (
    Additive,
    DenseKernel,
    Kernel,
    Mode,
    Saved,
    Tensors,
    cheapest,
    weight_pass,
)
from lora_algos.layer_op import LayerOp
from lora_algos.low_rank import add_low_rank, low_rank_grads
from lora_algos.tensors import Shapes, fitted, rank_and_alpha


def khatri_rao(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (out, r^2) and (r^2, in) whose product is (w1_a @ w1_b) o (w2_a @ w2_b)."""
    return (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1), (
        w1_b[:, None, :] * w2_b[None, :, :]
    ).flatten(0, 1)


def khatri_rao_grads(dup: Tensor, ddown: Tensor, factors: Tensors) -> Tensors:
    """From the gradients of the two products to those of the four factors."""
    w1_a, w1_b, w2_a, w2_b = factors
    r = w1_a.shape[1]
    dup, ddown = dup.view(-1, r, r), ddown.reshape(r, r, -1)
    return (
        torch.einsum("oij,oj->oi", dup, w2_a),
        torch.einsum("ijn,jn->in", ddown, w2_b),
        torch.einsum("oij,oi->oj", dup, w1_a),
        torch.einsum("ijn,in->jn", ddown, w1_b),
    )


@dataclass(frozen=True)
class Hadamard(Additive):
    """Factors (w1_a, w1_b, w2_a, w2_b)."""

    def delta(self, weight: Tensor, factors: Tensors) -> Tensor:
        w1_a, w1_b, w2_a, w2_b = factors
        return ((w1_a @ (w1_b * self.scaling)) * (w2_a @ w2_b)).view(self.shape)

    def whole(self, weight: Tensor, factors: Tensors) -> Tensor:
        return self.delta(weight, factors).add_(weight)

    def add(self, y: Tensor, x: Tensor, factors: Tensors) -> Tensors:
        up, down = khatri_rao(*factors)
        h = add_low_rank(self.op, y, x, up, down.view(-1, *self.shape[1:]), self.scaling)
        return (
            (h,) if 64 * h.shape[1 if self.op.spatial else -1] <= self.shape[1] else ()
        )  # else computed again

    def grads(self, grad: Tensor, saved: Saved, dx: Tensor | None) -> Tensors:
        factors = tuple(factor.to(grad.dtype) for factor in saved.factors)
        up, down = khatri_rao(*factors)
        as_low_rank = (up, down.view(-1, *self.shape[1:]), self.scaling)
        dup, ddown = low_rank_grads(
            self.op, grad, saved.x, as_low_rank, dx, saved.kept[0] if saved.kept else None
        )
        return khatri_rao_grads(dup, ddown, factors)

    def dense_grads(self, grad: Tensor, saved: Saved) -> Tensors:
        w1_a, w1_b, w2_a, w2_b = saved.factors
        by_rank, by_matrix = self._grad_costs(grad.numel() // self.shape[0], saved.factors)
        if by_rank < by_matrix:
            return self.grads(grad, saved, None)
        g = (
            self.op.weight_grad(grad, saved.x, self.shape)
            .flatten(1)
            .to(w1_a.dtype)
            .mul_(self.scaling)
        )
        first, second = (w1_a @ w1_b).mul_(g), (w2_a @ w2_b).mul_(g)
        return second @ w1_b.T, w1_a.T @ second, first @ w2_b.T, w2_a.T @ first

    def _grad_costs(self, tokens: int, factors: Tensors) -> tuple[float, float]:
        """Of the factors' gradients: through the rank-r^2 form, and through the gradient of the
        whole weight."""
        rank, out, fan_in = factors[0].shape[1], self.shape[0], self.shape[1:].numel()
        by_matrix = out * fan_in * (2 * tokens + 8 * rank) + 6 * weight_pass(
            self.shape, factors[0].device
        )
        return 4.0 * tokens * rank**2 * (out + fan_in), by_matrix

    def mode(self, tokens: int, wide: bool, factors: Tensors) -> Mode:
        rank, out, fan_in = factors[0].shape[1], self.shape[0], self.shape[1:].numel()
        grads = self._grad_costs(tokens, factors)
        # of dW, in both passes
        build = 8 * out * fan_in * rank + 8 * weight_pass(self.shape, factors[0].device)
        costs: dict[Mode, float] = {
            "factors": grads[0] + 2 * tokens * rank**2 * (2 * fan_in + out),
            "merged": min(grads) + build,
            "dense": min(grads) + build + 4 * tokens * out * fan_in,
        }
        return cheapest(costs, wide)


@dataclass(frozen=True)
class TuckerHadamard(DenseKernel):
    """Factors (w1_a, w1_b, w2_a, w2_b, t1, t2)."""

    def delta(self, weight: Tensor, factors: Tensors) -> Tensor:
        w1_a, w1_b, w2_a, w2_b, t1, t2 = factors
        first, second = (
            torch.einsum("ij...,jr->ir...", torch.einsum("ij...,ip->pj...", t, a), b)
            for t, a, b in ((t1, w1_a, w1_b), (t2, w2_a, w2_b))
        )
        return first * second * self.scaling


class LoHa(OwnAdapter):
    """A layer with a LoHa."""

    algorithm = "LoHa"
    detected_by = ("hada_w1_a",)
    rank_axis = {"hada_w1_b": 0}  # noqa: RUF012
    starts_at_zero = ("hada_w2_a",)
    own_options = ("rslora", "tucker")

    @classmethod
    def heeds(cls, option: str, options: AdapterOptions, weight: torch.Size) -> bool:
        no_core = option == "tucker" and weight[2:].numel() == 1
        return super().heeds(option, options, weight) and not no_core

    @classmethod
    def shapes(cls, spec: LayerSpec, weight: torch.Size) -> Shapes:
        out, channels, *kernel = weight
        r = spec.rank
        if spec.options.tucker and math.prod(kernel) > 1:
            sides: Shapes = {
                f"hada_w{i}_{s}": (r, n) for i in (1, 2) for s, n in (("a", out), ("b", channels))
            }
            return {**sides, "hada_t1": (r, r, *kernel), "hada_t2": (r, r, *kernel)}
        fan_in = channels * math.prod(kernel)
        return {
            f"hada_w{i}_{s}": shape
            for i in (1, 2)
            for s, shape in (("a", (out, r)), ("b", (r, fan_in)))
        }

    @classmethod
    def make_kernel(
        cls, op: LayerOp, spec: LayerSpec, weight: torch.Size, names: Iterable[str]
    ) -> Kernel:
        return (TuckerHadamard if "hada_t1" in names else Hadamard)(op, weight, spec.scaling)

    @classmethod
    def initialize(cls, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            nn.init.normal_(tensor, std=0.1 if name in ("hada_w1_a", "hada_t1", "hada_t2") else 1.0)
        nn.init.zeros_(tensors["hada_w2_a"])

    @classmethod
    def read_spec(cls, tensors: dict[str, Tensor], weight: torch.Size) -> tuple[LayerSpec, Shapes]:
        tucker = "hada_t1" in tensors
        spec = LayerSpec(*rank_and_alpha(tensors), cls.algorithm, AdapterOptions(tucker=tucker))
        return spec, fitted(tensors, cls.shapes(spec, weight), weight)


ADAPTER = LoHa
