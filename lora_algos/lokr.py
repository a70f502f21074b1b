"""LoKr: dW = scaling * w1 (x) w2, (x) the Kronecker product (LyCORIS, Yeh et al. 2023, arXiv
2309.14859).

Shapes, for a weight (a b, c d, *kernel) with a <= b and c <= d: lokr_w1 (a, c), lokr_w2 (b, d,
*kernel). Where the rank is below half the larger side, w2 is lokr_w2_a (b, rank) @ lokr_w2_b (rank,
d * kernel), and with decompose_both so is w1. scaling is alpha / rank, but 1 where neither is
decomposed. w2 (or w2_b) starts at zero.

On activations, seen as (c, d) channels, w2 and w1 are applied one after the other; a low-rank w2 in
two halves with w1 in between, where there are only `rank` channels: I (x) w2_a, w1 (x) I, I (x)
w2_b.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import AdapterError
from lora_algos.adapter import OwnAdapter
from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.kernels import Additive, Kernel, Mode, Saved, Tensors, cheapest, weight_pass
from lora_algos.layer_op import LayerOp, positions
from lora_algos.tensors import Shapes, fitted, known_rank, rank_and_alpha


def factorization(dim: int, factor: int) -> tuple[int, int]:
    """(small, large) with small * large == dim and small at most `factor`; -1: nearest to a square
    (LyCORIS' rule)."""
    if factor > 0 and dim % factor == 0:
        return min(factor, dim // factor), max(factor, dim // factor)
    limit = min(math.isqrt(dim), factor if factor > 0 else dim)
    small = next(n for n in range(limit, 0, -1) if dim % n == 0)
    return small, dim // small


@dataclass(frozen=True)
class Kronecker(Additive):
    """Factors (w1, w2), or (w1, w2_a, w2_b)."""

    def delta(self, weight: Tensor, factors: Tensors) -> Tensor:
        w1, w2 = factors[0], self._second(factors[1:])
        # kron wants w2 as it is after model.to(memory_format=torch.channels_last) laid out anew
        return torch.kron(
            (w1 * self.scaling).view(*w1.shape, *[1] * self.op.spatial), w2.contiguous()
        )

    def whole(self, weight: Tensor, factors: Tensors) -> Tensor:
        if self.op.spatial:
            return self.delta(weight, factors).add_(weight)
        w1, w2 = factors[0] * self.scaling, self._second(factors[1:])
        (a, c), (b, d) = w1.shape, w2.shape
        parts = weight.reshape(a, b, c, d)  # in one pass over the weight
        return torch.addcmul(parts, w1.view(a, 1, c, 1), w2.view(1, b, 1, d)).view(self.shape)

    def _second(self, halves: Tensors) -> Tensor:
        """w2 (b, d, *kernel)."""
        if len(halves) == 1:
            return halves[0]
        w2_a, w2_b = halves
        return (w2_a @ w2_b).view(w2_a.shape[0], -1, *self.shape[2:])

    def add(self, y: Tensor, x: Tensor, factors: Tensors) -> Tensors:
        w1 = factors[0] * self.scaling
        inner, outer = self._split(factors)
        mixed = mix(w1, self._inner(x, inner, w1.shape[1]))  # (n, a, inner channels, ...)
        add_outer(self.op, y, mixed, outer)
        return ()

    def _split(self, factors: Tensors) -> tuple[Tensor, Tensor | None]:
        """What is applied before w1, (channels, d, *kernel), and what after it, (b, channels)."""
        inner, outer = (factors[1], None) if len(factors) == 2 else (factors[2], factors[1])
        return inner.view(inner.shape[0], -1, *self.shape[2:]), outer

    def _inner(self, x: Tensor, inner: Tensor, c: int) -> Tensor:
        """(n, c, channels, ...), n tokens or images."""
        parts = self.op.ungrouped()(as_parts(self.op, x, c), inner)
        return parts.view(-1, c, *parts.shape[1:])

    def grads(self, grad: Tensor, saved: Saved, dx: Tensor | None) -> Tensors:
        factors = tuple(factor.to(grad.dtype) for factor in saved.factors)
        w1, (inner, outer) = factors[0] * self.scaling, self._split(factors)
        c, op = w1.shape[1], self.op.ungrouped()
        parts = as_parts(self.op, saved.x, c)
        if outer is None:
            dw1, d_inner = self._grads_of_whole(grad, parts, (w1, inner), dx)
            return dw1, d_inner.view(factors[1].shape)
        before = self._inner(saved.x, inner, c)
        d_mixed, d_outer = outer_grads(self.op, grad, mix(w1, before), outer)
        dw1 = torch.matmul(d_mixed.flatten(2), before.flatten(2).mT).sum(0).mul_(self.scaling)
        d_before = mix(w1.T, d_mixed).flatten(0, 1)
        if dx is not None:
            dx.add_(op.input_grad(d_before, inner, parts.shape).reshape(dx.shape))
        return dw1, d_outer, op.weight_grad(d_before, parts, inner.shape).view(factors[2].shape)

    def _grads_of_whole(
        self, grad: Tensor, parts: Tensor, factors: tuple[Tensor, Tensor], dx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """For an undivided w2: the gradient goes through it first, so what it made of x is not
        needed again."""
        (w1, w2), op = factors, self.op.ungrouped()
        a, c = w1.shape
        grads = as_parts(self.op, grad, a)
        n = grads.shape[0] // a
        through = op.input_grad(grads, w2, torch.Size((n * a, *parts.shape[1:]))).view(
            n, a, *parts.shape[1:]
        )
        given = parts.view(n, c, *parts.shape[1:])
        dw1 = torch.matmul(through.flatten(2), given.flatten(2).mT).sum(0).mul_(self.scaling)
        if dx is not None:
            dx.add_(mix(w1.T, through).reshape(dx.shape))
        mixed = mix(w1.T, grads.view(n, a, *grads.shape[1:])).flatten(0, 1)
        return dw1, op.weight_grad(mixed, parts, w2.shape)

    def by_factors(self, factors: Tensors) -> bool:
        return self.op.groups == 1

    def mode(self, tokens: int, wide: bool, factors: Tensors) -> Mode:
        if len(factors) == 3:
            return "factors"
        (a, c), (out, fan_in) = factors[0].shape, (self.shape[0], self.shape[1:].numel())
        # merging saves w2 over the input, and w1 over the output and over the gradient
        step = fan_in * (out // a) + 2 * out * c
        build = 2 * weight_pass(self.shape, factors[0].device)
        costs: dict[Mode, float] = {
            "factors": 2.0 * tokens * step,
            "merged": build,
            "dense": build + 4.0 * tokens * out * fan_in,
        }
        return cheapest(costs, wide)

    def dense_grads(self, grad: Tensor, saved: Saved) -> Tensors:
        return (
            super().dense_grads(grad, saved)
            if self.op.groups > 1
            else self.grads(grad, saved, None)
        )


def as_parts(op: LayerOp, x: Tensor, c: int) -> Tensor:
    """`x` with its channels split in c parts that become part of the batch: (n c, d, *spatial), or
    (n c, d)."""
    if op.spatial:
        return x.reshape(x.shape[0] * c, x.shape[1] // c, *x.shape[2:])
    return x.reshape(-1, x.shape[-1] // c)


def mix(w1: Tensor, z: Tensor) -> Tensor:
    """w1 (a, c) over the parts of `z` (n, c, ...): (n, a, ...)."""
    return torch.matmul(w1, z.flatten(2)).view(z.shape[0], w1.shape[0], *z.shape[2:])


def add_outer(op: LayerOp, y: Tensor, mixed: Tensor, outer: Tensor | None) -> None:
    """Adds `mixed` (n, a, channels, ...) to `y` in place, after `outer` (b, channels) if there is
    one."""
    n, a, channels = mixed.shape[:3]
    if outer is None:
        y.add_(mixed.reshape(y.shape))
    elif not op.spatial:
        y.view(n * a, outer.shape[0]).addmm_(mixed.view(n * a, channels), outer.T)
    elif y.is_contiguous():
        parts = y.view(n * a, outer.shape[0], positions(y))
        parts.baddbmm_(outer.expand(n * a, *outer.shape), mixed.view(n * a, channels, positions(y)))
    else:
        y.add_(torch.matmul(outer, mixed.view(n * a, channels, positions(y))).reshape(y.shape))


def outer_grads(op: LayerOp, grad: Tensor, mixed: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `mixed` (n, a, channels, ...) and of `outer` (b, channels)."""
    if not op.spatial:
        flat = grad.reshape(-1, outer.shape[0])
        return (flat @ outer).view(mixed.shape), flat.T @ mixed.flatten(0, 1)
    n, a, channels = mixed.shape[:3]
    flat = grad.reshape(n * a, outer.shape[0], positions(grad))
    d_outer = torch.bmm(flat, mixed.view(n * a, channels, positions(grad)).mT).sum(0)
    return torch.matmul(outer.T, flat).view(mixed.shape), d_outer


class LoKr(OwnAdapter):
    """A layer with a LoKr."""

    algorithm = "LoKr"
    detected_by = ("lokr_w1", "lokr_w1_a")
    rank_axis = {"lokr_w2": 0, "lokr_w2_b": 0}  # noqa: RUF012
    own_options = ("rslora", "factor", "decompose_both", "full_matrix")

    @classmethod
    def shapes(cls, spec: LayerSpec, weight: torch.Size) -> Shapes:
        out, channels, *kernel = weight
        (a, b), (c, d) = (factorization(n, spec.options.factor) for n in (out, channels))
        r, whole = spec.rank, spec.options.full_matrix
        low_1 = spec.options.decompose_both and not whole and r < max(a, c) / 2
        low_2 = not whole and r < max(b, d) / 2
        first: Shapes = {"lokr_w1_a": (a, r), "lokr_w1_b": (r, c)} if low_1 else {"lokr_w1": (a, c)}
        second: Shapes = {"lokr_w2": (b, d, *kernel)}
        if low_2:
            second = {"lokr_w2_a": (b, r), "lokr_w2_b": (r, d * math.prod(kernel))}
        return {**first, **second}

    @classmethod
    def make_kernel(
        cls, op: LayerOp, spec: LayerSpec, weight: torch.Size, names: Iterable[str]
    ) -> Kernel:
        # 1 where no factor has a rank, as ComfyUI, LyCORIS and A1111 read such files, whatever
        # their alpha
        return Kronecker(op, weight, 1.0 if {*names} == {"lokr_w1", "lokr_w2"} else spec.scaling)

    @classmethod
    def read_spec(cls, tensors: dict[str, Tensor], weight: torch.Size) -> tuple[LayerSpec, Shapes]:
        (out, channels, *kernel), has = weight, tensors.keys()
        rank, alpha = rank_and_alpha(tensors)
        first = [tensors[n].shape for n in ("lokr_w1", "lokr_w1_a", "lokr_w1_b") if n in has]
        a, c = (
            (first[0][0], first[-1][-1])
            if first and all(len(shape) >= 2 for shape in first)
            else (0, 0)
        )
        if not a or not c or out % a or channels % c:
            raise AdapterError(
                f"lokr_w1 of {[tuple(s) for s in first]} does not divide a weight of {tuple(weight)}"
            )
        b, d = out // a, channels // c
        shapes: Shapes = (
            {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, c)}
            if "lokr_w1_a" in has
            else {"lokr_w1": (a, c)}
        )
        low: Shapes = {"lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d * math.prod(kernel))}
        shapes |= low if "lokr_w2_a" in has else {"lokr_w2": (b, d, *kernel)}
        options = AdapterOptions(
            decompose_both="lokr_w1_a" in has, full_matrix=known_rank(tensors) is None
        )
        spec = LayerSpec(rank, alpha, cls.algorithm, options)
        return spec, fitted(tensors, shapes, weight)

    @classmethod
    def factors_of(cls, tensors: dict[str, Tensor], spec: LayerSpec) -> Tensors:
        w1 = (
            tensors["lokr_w1"]
            if "lokr_w1" in tensors
            else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
        )
        return w1, *(tensor for name, tensor in tensors.items() if name.startswith("lokr_w2"))

    def size(self, scaling: str) -> str:
        whole = {*self.tensors()} == {"lokr_w1", "lokr_w2"}
        return "whole factors, scaling = 1" if whole else super().size(scaling)

    @classmethod
    def initialize(cls, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name in ("lokr_w2", "lokr_w2_b"):
                nn.init.zeros_(tensor)
            else:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


ADAPTER = LoKr
