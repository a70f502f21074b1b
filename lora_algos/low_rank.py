"""The product of two thin factors as an update: what LoRA is, and what LoHa becomes for small
ranks.

dW = scaling * up @ down, with down (rank, in / groups, *kernel) and up (out, rank, 1...). On
activations: h = down(x) has `rank` channels and goes through the layer's own stride, padding and
dilation; up mixes channels. In a grouped convolution each group of input channels meets all of
down, and each group of output channels its own rows of up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import AdapterError
from lora_algos.kernels import WIDE, Additive, Saved, Tensors, narrowed
from lora_algos.layer_op import LayerOp, positions, rows

TINY = 1e-30  # a channel without weights has the norm 0, and no direction
NOT_FINITE = "its update is not finite (NaN or infinite values), or too large for fp32"
SMALL = (
    2**17
)  # elements of an input; a convolution keeps its input whoever writes its backward pass


def is_channels_last(op: LayerOp, x: Tensor) -> bool:
    """Whether `x` is a matrix (tokens, channels) in memory."""
    return not op.spatial or (x.movedim(1, -1).is_contiguous() and not x.is_contiguous())


def channels_last_rows(op: LayerOp, x: Tensor) -> Tensor:
    """`x` as a matrix (tokens, channels): a view if it is that in memory."""
    return rows(x.movedim(1, -1) if op.spatial else x)


def planes(op: LayerOp, x: Tensor) -> Tensor:
    """A convolution's `x` (B, C, *spatial) as (B * groups, C / groups, positions)."""
    return x.reshape(x.shape[0] * op.groups, x.shape[1] // op.groups, positions(x))


def per_group(op: LayerOp, up: Tensor, batch: int) -> Tensor:
    """up (out, rank, 1...) as (batch * groups, out / groups, rank)."""
    matrices = up.reshape(op.groups, -1, up.shape[1])
    return matrices.expand(batch, *matrices.shape).reshape(-1, *matrices.shape[1:])


def groups_as_batch(op: LayerOp, x: Tensor) -> Tensor:
    """`x` (B, C, *spatial) as (B * groups, C / groups, *spatial)."""
    return (
        x
        if op.groups == 1
        else x.reshape(x.shape[0] * op.groups, x.shape[1] // op.groups, *x.shape[2:])
    )


def add_low_rank(
    op: LayerOp, y: Tensor, x: Tensor, up: Tensor, down: Tensor, scaling: float
) -> Tensor:
    """Adds the update's output to `y` in place. Returns h, what `down` makes of `x`."""
    h = op.ungrouped()(groups_as_batch(op, x), down)
    if op.groups == 1 and is_channels_last(op, y):
        channels_last_rows(op, y).addmm_(channels_last_rows(op, h), up.flatten(1).T, alpha=scaling)
    elif y.is_contiguous():
        planes(op, y).baddbmm_(per_group(op, up, x.shape[0]), h.flatten(2), alpha=scaling)
    else:
        y.add_(torch.bmm(per_group(op, up, x.shape[0]), h.flatten(2)).view(y.shape), alpha=scaling)
    return h


def low_rank_grads(
    op: LayerOp,
    grad: Tensor,
    x: Tensor,
    factors: tuple[Tensor, Tensor, float],
    dx: Tensor | None,
    h: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of up and down, given (up, down, scaling); adds that of the input to `dx`. `h`
    None: computed again."""
    up, down, scaling = factors
    one_group, grouped_x = op.ungrouped(), groups_as_batch(op, x)
    h = one_group(grouped_x, down) if h is None else h
    if op.groups == 1 and is_channels_last(op, grad):
        flat = channels_last_rows(op, grad)
        dup = (flat.T @ channels_last_rows(op, h)).mul_(scaling)
        dh = torch.mm(flat, up.flatten(1) * scaling)
        dh = dh.view(grad.shape[0], *grad.shape[2:], -1).movedim(-1, 1) if op.spatial else dh
    else:
        flat = planes(op, grad)
        dup = (
            torch.bmm(flat, h.flatten(2).mT)
            .view(x.shape[0], *up.flatten(1).shape)
            .sum(0)
            .mul_(scaling)
        )
        dh = torch.bmm(per_group(op, up * scaling, x.shape[0]).mT, flat).view_as(h)
    if dx is not None:
        if op.spatial:
            dx.add_(one_group.input_grad(dh, down, grouped_x.shape).reshape(dx.shape))
        else:
            rows(dx).addmm_(dh, down)
    return dup.view(up.shape), one_group.weight_grad(dh, grouped_x, down.shape)


def squared_norms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """||W||^2 per output channel, with sums in `dtype`."""
    wide = (
        weight.to(dtype) if weight.dtype.itemsize == 1 else weight
    )  # of float8, which has no sums, a copy
    return torch.linalg.vector_norm(wide.flatten(1), dim=1, dtype=dtype).square()


def norms_after(weight: Tensor, up: Tensor, down: Tensor, scaling: float, base: Tensor) -> Tensor:
    """||W + scaling up @ down|| per output channel, without forming the sum; `base` is ||W||^2."""
    up, down = up.flatten(1), down.flatten(1) * scaling
    cross = ((weight.reshape(up.shape[0], -1).to(up.dtype) @ down.T) * up).sum(1)
    own = ((up @ (down @ down.T)) * up).sum(1)
    return (base + 2 * cross + own).clamp_min(TINY).sqrt()


def thin_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values (u, s, v) of up @ down, which is never formed. In fp64, so that what cancels in it
    does so to the last digit of the factors. AdapterError if it is not finite."""
    (left, a), (right, b) = torch.linalg.qr(up.double()), torch.linalg.qr(down.double().T)
    u, s, v = finite_svd(a @ b.T)
    return left @ u, s, v @ right.T


def difference(
    up: Tensor, down: Tensor, initial_up: Tensor, initial_down: Tensor
) -> tuple[Tensor, Tensor]:
    """Factors of up @ down - initial_up @ initial_down, in as few ranks as that takes: side by side the two products
    would be rounded by themselves, which in bf16 leaves little of a difference that is small."""
    u, s, v = thin_svd(torch.cat([up, -initial_up], 1), torch.cat([down, initial_down]))
    root = s.sqrt()
    return (u * root).to(up.dtype), (root[:, None] * v).to(up.dtype)


def finite_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values (u, s, v); AdapterError if there are none."""
    try:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise AdapterError(f"{NOT_FINITE} ({error})") from error
    return u, s, v


@dataclass(frozen=True)
class LowRank(Additive):
    """Factors (up, down). `twin`: the second half of the ranks takes away what the first half
    started with."""

    twin: bool = False

    def delta(self, weight: Tensor, factors: Tensors) -> Tensor:
        up, down = factors[0].flatten(1), factors[1].flatten(1) * self.scaling
        # the halves apart, so that they cancel to exactly zero
        parts = 2 if self.twin else 1
        products = [u @ d for u, d in zip(up.chunk(parts, 1), down.chunk(parts), strict=True)]
        return sum(products[1:], products[0]).view(self.shape)

    def plain(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensors
    ) -> Tensor | None:
        op = self.op
        if not op.spatial and (x.numel() > SMALL or (bias is None and x.dtype not in WIDE)):
            return None
        up, down = (factor.to(x.dtype) for factor in factors)
        y, h = (
            op(x, weight.to(x.dtype), narrowed(bias, x)),
            op.ungrouped()(groups_as_batch(op, x), down),
        )
        if op.groups == 1 and is_channels_last(op, y):
            flat, flat_h = channels_last_rows(op, y), channels_last_rows(op, h)
            y_flat = torch.addmm(flat, flat_h, up.flatten(1).T, alpha=self.scaling)
            return (
                y_flat.view(y.movedim(1, -1).shape).movedim(-1, 1)
                if op.spatial
                else y_flat.view(y.shape)
            )
        ups = per_group(op, up, x.shape[0])
        return torch.baddbmm(planes(op, y), ups, h.flatten(2), alpha=self.scaling).view(y.shape)

    def add(self, y: Tensor, x: Tensor, factors: Tensors) -> Tensors:
        up, down = factors
        return (add_low_rank(self.op, y, x, up, down, self.scaling),)

    def grads(self, grad: Tensor, saved: Saved, dx: Tensor | None) -> Tensors:
        up, down = (factor.to(grad.dtype) for factor in saved.factors)
        h = saved.kept[0] if saved.kept else None
        return low_rank_grads(self.op, grad, saved.x, (up, down, self.scaling), dx, h)
