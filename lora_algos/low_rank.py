"""The product of two thin factors as an update: LoRA, and LoHa for small ranks.

dW = scaling * up @ down, with down (rank, in / groups, *kernel) and up (out, rank, 1...).

On activations: h = down(x) has `rank` channels and passes through the layer's own stride, padding
and dilation; up mixes channels. In a grouped convolution, each group of input channels meets all of
down. Each group of output channels meets its own rows of up.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import AdapterError
from lora_algos.frozen_weight import weight_values
from lora_algos.kernels import (
    WIDE_DTYPES,
    AdditiveKernel,
    Factors,
    Gradients,
    SavedTensors,
)
from lora_algos.layer_op import LayerOp, as_matrix, bias_like, num_positions
from lora_algos.tensors import ALPHA, LayerTensors

UP, DOWN = "lora_up.weight", "lora_down.weight"
"""Names of the factors of a LoRA in a file."""
MIN_NORM = 1e-30
"""Lower bound of a channel's norm: a channel without weights has norm 0 and no direction."""
NOT_FINITE = "its update is not finite (NaN or infinite values), or too large for fp32"
MAX_AUTOGRAD_ELEMENTS = 2**17
"""Size of a Linear layer's input up to which autograd's own passes are faster.

A convolution saves its input in both cases."""


class LowRankUpdate(NamedTuple):
    """The update scaling * up @ down."""

    up: Tensor
    down: Tensor
    scaling: float


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


def add_low_rank(
    op: LayerOp,
    y: Tensor,
    x: Tensor,
    update: LowRankUpdate,
) -> Tensor:
    """Add the update's output to `y` in place. Return h = down(x)."""
    up, down, scaling = update
    h = op.for_one_group()(groups_as_batch(op, x), down)
    if op.groups == 1 and is_channels_last(op, y):
        y_matrix = tokens_by_channels(op, y)
        h_matrix = tokens_by_channels(op, h)
        y_matrix.addmm_(h_matrix, up.flatten(1).T, alpha=scaling)
        return h
    h_groups = h.flatten(2)
    grouped_up = up_of_groups(op, up, x.shape[0])
    if y.is_contiguous():
        y_groups = groups_by_positions(op, y)
        y_groups.baddbmm_(grouped_up, h_groups, alpha=scaling)
    else:
        output = torch.bmm(grouped_up, h_groups)
        y.add_(output.view(y.shape), alpha=scaling)
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

    `h`: down(x), computed again if None."""
    up, down, scaling = update
    group_op = op.for_one_group()
    grouped_x = groups_as_batch(op, x)
    if h is None:
        h = group_op(grouped_x, down)
    if op.groups == 1 and is_channels_last(op, grad):
        up_grad, h_grad = token_grads(op, grad, h, update)
    else:
        up_grad, h_grad = group_grads(op, grad, h, update)
    if input_grad is not None:
        if op.spatial_dims:
            added_grad = group_op.input_grad(h_grad, down, grouped_x.shape)
            input_grad.add_(added_grad.reshape(input_grad.shape))
        else:
            as_matrix(input_grad).addmm_(h_grad, down)
    down_grad = group_op.weight_grad(h_grad, grouped_x, down.shape)
    return up_grad.mul_(scaling).view(up.shape), down_grad


def token_grads(
    op: LayerOp,
    grad: Tensor,
    h: Tensor,
    update: LowRankUpdate,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of up, unscaled, and of h, for a channels-last output."""
    grad_matrix = tokens_by_channels(op, grad)
    h_matrix = tokens_by_channels(op, h)
    up_grad = grad_matrix.T @ h_matrix
    scaled_up = update.up.flatten(1) * update.scaling
    h_grad = torch.mm(grad_matrix, scaled_up)
    if op.spatial_dims:
        batch_size, _, *sides = grad.shape
        h_grad = h_grad.view(batch_size, *sides, -1).movedim(-1, 1)
    return up_grad, h_grad


def group_grads(
    op: LayerOp,
    grad: Tensor,
    h: Tensor,
    update: LowRankUpdate,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of up, unscaled, and of h, for the output of a convolution."""
    batch_size = grad.shape[0]
    grad_groups = groups_by_positions(op, grad)
    products = torch.bmm(grad_groups, h.flatten(2).mT)
    up_shape = update.up.flatten(1).shape
    up_grad = products.view(batch_size, *up_shape).sum(0)
    scaled_up = up_of_groups(op, update.up * update.scaling, batch_size)
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
    update: LowRankUpdate,
    weight_norms: Tensor,
) -> Tensor:
    """Return ||W + dW|| per output channel without forming the sum.

    `weight_norms`: ||W||^2 per output channel."""
    up = update.up.flatten(1)
    down = update.down.flatten(1) * update.scaling
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
        down_matrix = down.flatten(1) * self.scaling
        if not self.subtracts_start:
            return (up_matrix @ down_matrix).view(self.shape)
        # each half has its own product, so that the products cancel to exactly zero at first
        up_trained, up_start = up_matrix.chunk(2, 1)
        down_trained, down_start = down_matrix.chunk(2)
        difference = up_trained @ down_trained + up_start @ down_start
        return difference.view(self.shape)

    def autograd_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        factors: Factors,
    ) -> Tensor | None:
        op = self.op
        rounds_once = bias is None and x.dtype not in WIDE_DTYPES
        is_large = x.numel() > MAX_AUTOGRAD_ELEMENTS
        if not op.spatial_dims and (rounds_once or is_large):
            return None
        up, down = (factor.to(x.dtype) for factor in factors)
        y = op(x, weight_values(weight, x.dtype), bias_like(bias, x))
        h = op.for_one_group()(groups_as_batch(op, x), down)
        if op.groups > 1 or not is_channels_last(op, y):
            y_groups = groups_by_positions(op, y)
            grouped_up = up_of_groups(op, up, x.shape[0])
            y_groups = torch.baddbmm(y_groups, grouped_up, h.flatten(2), alpha=self.scaling)
            return y_groups.view(y.shape)
        y_matrix = tokens_by_channels(op, y)
        h_matrix = tokens_by_channels(op, h)
        y_matrix = torch.addmm(y_matrix, h_matrix, up.flatten(1).T, alpha=self.scaling)
        if not op.spatial_dims:
            return y_matrix.view(y.shape)
        return y_matrix.view(y.movedim(1, -1).shape).movedim(-1, 1)

    def add_output(
        self,
        y: Tensor,
        x: Tensor,
        factors: Factors,
    ) -> tuple[Tensor, ...]:
        up, down = factors
        update = LowRankUpdate(up, down, self.scaling)
        return (add_low_rank(self.op, y, x, update),)

    def output_grads(
        self,
        grad: Tensor,
        saved: SavedTensors,
        input_grad: Tensor | None,
    ) -> Gradients:
        up, down = (factor.to(grad.dtype) for factor in saved.factors)
        update = LowRankUpdate(up, down, self.scaling)
        h = saved.extras[0] if saved.extras else None
        return low_rank_grads(self.op, grad, saved.activation, update, input_grad, h)
