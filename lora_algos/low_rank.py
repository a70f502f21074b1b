"""The product of two thin factors as an update: LoRA, and LoHa for small ranks.

dW = scaling * up @ down, with down (rank, in / groups, *kernel) and up (out, rank, 1...).

On activations: h = down(x) has `rank` channels and passes through the layer's own stride, padding
and dilation; up mixes channels. In a grouped convolution, each group of input channels meets all of
down. Each group of output channels meets its own rows of up.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import AdapterError
from lora_algos.kernels import AdditiveKernel, Factors, Gradients, Prepared, SavedTensors, Term
from lora_algos.layer_op import LayerOp, as_matrix, num_positions, scaled, wide_product
from lora_algos.tensors import ALPHA, LayerTensors

UP, DOWN = "lora_up.weight", "lora_down.weight"
"""Names of the factors of a LoRA in a file."""
MIN_NORM = 1e-30
"""Lower bound of a channel's norm: a channel without weights has norm 0 and no direction."""
NOT_FINITE = "its update is not finite (NaN or infinite values), or too large for fp32"


class LowRankUpdate(NamedTuple):
    """The update scaling * up @ down, as passes compute with it.

    Two factors contain the scaling, so that no pass multiplies by it. They are the others if the
    scaling is 1."""

    up: Tensor
    down: Tensor
    scaled_up: Tensor
    scaled_down: Tensor


def low_rank_terms(scaling: float, first: int = 0) -> tuple[Term, ...]:
    """Return a LowRankUpdate in terms of two factors. `first`: index of up."""
    up, down = first, first + 1
    return (
        Term(up),
        Term(down),
        Term(up, scaling),
        Term(down, scaling),
    )


def is_channels_last(op: LayerOp, x: Tensor) -> bool:
    """Return whether `x` is a matrix (tokens, channels) in memory."""
    if not op.spatial_dims:
        return True
    has_channels_first = x.is_contiguous()
    return not has_channels_first and x.movedim(1, -1).is_contiguous()


def tokens_by_channels(op: LayerOp, x: Tensor) -> Tensor:
    """Return `x` as a matrix (tokens, channels): a view if `is_channels_last`."""
    return as_matrix(x.movedim(1, -1) if op.spatial_dims else x)


def groups_by_positions(op: LayerOp, x: Tensor) -> Tensor:
    """Return a convolution's (B, C, *spatial) as (B * groups, C / groups, positions)."""
    return x.reshape(x.shape[0] * op.groups, x.shape[1] // op.groups, num_positions(x))


def groups_as_batch(op: LayerOp, x: Tensor) -> Tensor:
    """Return (B, C, *spatial) as (B * groups, C / groups, *spatial).

    Linear layers have one group."""
    if op.groups == 1:
        return x
    batch_size, channels, *sides = x.shape
    return x.reshape(batch_size * op.groups, channels // op.groups, *sides)


def up_of_groups(op: LayerOp, up: Tensor, batch_size: int) -> Tensor:
    """Return up (out, rank, 1...) as (batch * groups, out / groups, rank)."""
    matrices = up.reshape(op.groups, -1, up.shape[1])
    return matrices.expand(batch_size, *matrices.shape).reshape(-1, *matrices.shape[1:])


def low_rank_output(x: Tensor, update: LowRankUpdate) -> tuple[Tensor, Tensor]:
    """Return the update's output of a Linear layer, and h = scaling * down(x)."""
    h = F.linear(x, update.scaled_down)
    return F.linear(h, update.up), h


def add_low_rank(
    op: LayerOp,
    y: Tensor,
    x: Tensor,
    update: LowRankUpdate,
) -> Tensor:
    """Add the update's output to `y` in place. Return h = scaling * down(x)."""
    up = update.up
    if not op.spatial_dims:
        h = F.linear(x, update.scaled_down)
        as_matrix(y).addmm_(as_matrix(h), up.T)
        return h
    h = op.for_one_group()(groups_as_batch(op, x), update.scaled_down)
    if op.groups == 1 and is_channels_last(op, y):
        y_matrix = tokens_by_channels(op, y)
        h_matrix = tokens_by_channels(op, h)
        y_matrix.addmm_(h_matrix, up.flatten(1).T)
        return h
    h_groups = h.flatten(2)
    grouped_up = up_of_groups(op, up, x.shape[0])
    if y.is_contiguous():
        y_groups = groups_by_positions(op, y)
        y_groups.baddbmm_(grouped_up, h_groups)
    else:
        output = torch.bmm(grouped_up, h_groups)
        y.add_(output.view(y.shape))
    return h


def low_rank_grads(
    op: LayerOp,
    grad: Tensor,
    x: Tensor,
    update: LowRankUpdate,
    input_grad: Tensor | None,
    h: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of up and down; add the gradient of the input to `input_grad`.

    `input_grad` may be `grad` itself. `h`: scaling * down(x), computed again if None."""
    if op.spatial_dims:
        return convolution_grads(op, grad, x, update, input_grad, h)
    grad_matrix, x_matrix = as_matrix(grad), as_matrix(x)
    h_matrix = torch.mm(x_matrix, update.scaled_down.T) if h is None else as_matrix(h)
    up_grad = wide_product(grad_matrix.T, h_matrix)
    h_grad = torch.mm(grad_matrix, update.scaled_up)
    if input_grad is not None:
        as_matrix(input_grad).addmm_(h_grad, update.down)
    return up_grad, wide_product(h_grad.T, x_matrix)


def convolution_grads(
    op: LayerOp,
    grad: Tensor,
    x: Tensor,
    update: LowRankUpdate,
    input_grad: Tensor | None,
    h: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Do what `low_rank_grads` does, for a convolution."""
    up, down = update.up, update.down
    group_op = op.for_one_group()
    grouped_x = groups_as_batch(op, x)
    if h is None:
        h = group_op(grouped_x, update.scaled_down)
    if op.groups == 1 and is_channels_last(op, grad):
        up_grad, h_grad = token_grads(op, grad, h, update)
    else:
        up_grad, h_grad = group_grads(op, grad, h, update)
    if input_grad is not None:
        added_grad = group_op.input_grad(h_grad, down, grouped_x.shape)
        input_grad.add_(added_grad.reshape(input_grad.shape))
    down_grad = group_op.weight_grad(h_grad, grouped_x, down.shape)
    return up_grad.view(up.shape), down_grad


def token_grads(
    op: LayerOp,
    grad: Tensor,
    h: Tensor,
    update: LowRankUpdate,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of up, and of h without its scaling, for a channels-last output."""
    grad_matrix = tokens_by_channels(op, grad)
    h_matrix = tokens_by_channels(op, h)
    up_grad = wide_product(grad_matrix.T, h_matrix)
    h_grad = torch.mm(grad_matrix, update.scaled_up.flatten(1))
    batch_size, _, *sides = grad.shape
    return up_grad, h_grad.view(batch_size, *sides, -1).movedim(-1, 1)


def group_grads(
    op: LayerOp,
    grad: Tensor,
    h: Tensor,
    update: LowRankUpdate,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of up, and of h without its scaling, for the output of a convolution."""
    batch_size = grad.shape[0]
    grad_groups = groups_by_positions(op, grad)
    products = torch.bmm(grad_groups, h.flatten(2).mT)
    up_shape = update.up.flatten(1).shape
    up_grad = products.view(batch_size, *up_shape).sum(0)
    scaled_up = up_of_groups(op, update.scaled_up, batch_size)
    h_grad = torch.bmm(scaled_up.mT, grad_groups)
    return up_grad, h_grad.view_as(h)


def squared_norms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ||W||^2 per output channel, summed in `dtype`."""
    if weight.dtype.itemsize == 1:  # float8 has no sums
        weight = weight.to(dtype)
    rows = weight.flatten(1)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return norms.square()


def merged_norms(
    weight: Tensor,
    up: Tensor,
    scaled_down: Tensor,
    weight_norms: Tensor,
) -> Tensor:
    """Return ||W + up @ scaled_down|| per output channel without forming the sum.

    `weight_norms`: ||W||^2 per output channel."""
    up = up.flatten(1)
    down = scaled_down.flatten(1)
    weight_matrix = weight.reshape(up.shape[0], -1).to(up.dtype)
    weight_products = weight_matrix @ down.T
    cross_terms = (weight_products * up).sum(1)
    update_products = up @ (down @ down.T)
    update_norms = (update_products * up).sum(1)
    total = weight_norms + 2 * cross_terms + update_norms
    return total.clamp_min(MIN_NORM).sqrt()


def thin_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return singular vectors and values (u, s, v) of up @ down, which is never formed.

    Computed in fp64, so that terms that cancel do so to the last digit of the factors. Raises
    AdapterError if the product is not finite."""
    left, left_factor = torch.linalg.qr(up.double())
    right, right_factor = torch.linalg.qr(down.double().T)
    small_product = left_factor @ right_factor.T
    u, s, v = finite_svd(small_product)
    return left @ u, s, v @ right.T


def product_difference(
    up: Tensor,
    down: Tensor,
    initial_up: Tensor,
    initial_down: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return factors of up @ down - initial_up @ initial_down of the smallest possible rank.

    Stacked, the two products would be rounded separately. In bf16 this leaves little of a small
    difference."""
    stacked_up = torch.cat([up, -initial_up], 1)
    stacked_down = torch.cat([down, initial_down])
    u, s, v = thin_svd(stacked_up, stacked_down)
    root = s.sqrt()
    return (u * root).to(up.dtype), (root[:, None] * v).to(up.dtype)


def finite_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return singular vectors and values (u, s, v). Raises AdapterError if the SVD fails."""
    try:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise AdapterError(f"{NOT_FINITE} ({error})") from error
    return u, s, v


def tucker_product(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the tensor (out, in, *kernel) of a core, `a` (rank, out) and `b` (rank, in)."""
    with_rows = torch.einsum("ij...,ip->pj...", core, a)
    return torch.einsum("ij...,jr->ir...", with_rows, b)


def lora_tensors(
    up: Tensor,
    down: Tensor,
    weight: torch.Size,
) -> LayerTensors:
    """Return the tensors of a LoRA with scaling 1, from matrices (out, rank) and (rank, in)."""
    _, channels, *kernel = weight
    rank = down.shape[0]
    pointwise = [1] * len(kernel)
    return {
        UP: up.reshape(-1, rank, *pointwise).contiguous(),
        DOWN: down.reshape(rank, channels, *kernel).contiguous(),
        ALPHA: torch.tensor(float(rank)),
    }


@dataclass(frozen=True)
class LowRank(AdditiveKernel):
    """Factors (up, down)."""

    subtracts_start: bool = False
    """The second half of the ranks subtracts the values that the first half started with."""

    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        """Return the update (out, in, *kernel)."""
        up, down = factors
        up_matrix = up.flatten(1)
        down_matrix = scaled(down.flatten(1), self.scaling)
        if not self.subtracts_start:
            return (up_matrix @ down_matrix).view(self.shape)
        # each half has its own product, so that the products cancel to exactly zero at first
        up_trained, up_start = up_matrix.chunk(2, 1)
        down_trained, down_start = down_matrix.chunk(2)
        difference = up_trained @ down_trained + up_start @ down_start
        return difference.view(self.shape)

    def terms(self) -> tuple[Term, ...]:
        return low_rank_terms(self.scaling)

    def output(self, x: Tensor, prepared: Prepared) -> tuple[Tensor, tuple[Tensor, ...]]:
        update = LowRankUpdate(*prepared)
        y, h = low_rank_output(x, update)
        return y, (h,)

    def add_output(
        self,
        y: Tensor,
        x: Tensor,
        prepared: Prepared,
    ) -> tuple[Tensor, ...]:
        return (add_low_rank(self.op, y, x, LowRankUpdate(*prepared)),)

    def output_grads(
        self,
        grad: Tensor,
        saved: SavedTensors,
        input_grad: Tensor | None,
    ) -> Gradients:
        update = LowRankUpdate(*saved.prepared)
        h = saved.extras[0] if saved.extras else None
        return low_rank_grads(self.op, grad, saved.activation, update, input_grad, h)
