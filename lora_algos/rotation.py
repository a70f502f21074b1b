"""Rotations of output channels in blocks, for OFT and BOFT: the Cayley transform, its gradient, and
the rotation of activations.

R = (I + Q) (I - Q)^-1 with Q = B - B^T is orthogonal for any B. With S = (I - Q)^-1:
R - I = 2 S Q, which loses no precision for small Q. The gradient of Q is 2 S^T G S^T. As S is
I + (R - I) / 2, the backward pass needs R - I alone. S = (I + Q) P with P = (I - Q^2)^-1: the matrix
that is inverted is symmetric, which halves the cost.
"""

import torch
from torch import Tensor

from lora_algos.kernels import WIDE_DTYPES
from lora_algos.layer_op import LayerOp, num_positions
from lora_algos.low_rank import is_channels_last, tokens_by_channels


def symmetric_inverse(matrices: Tensor) -> Tensor:
    """Return the inverses of symmetric matrices with eigenvalues of at least 1.

    torch.linalg.inv would wait for the device."""
    if matrices.device.type != "cpu":
        return torch.linalg.inv_ex(matrices).inverse
    factor = torch.linalg.cholesky_ex(matrices).L
    return torch.cholesky_inverse(factor)


def cayley_change(blocks: Tensor) -> Tensor:
    """Return R - I of blocks (..., b, b)."""
    q = blocks - blocks.mT
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    p = symmetric_inverse(identity - q @ q)
    s = p + q @ p
    return 2 * s @ q


def cayley_grad(products: Tensor, change: Tensor) -> Tensor:
    """Return the gradient of blocks (n, b, b), for an output y = R^T y0.

    `products`: y g^T, with g the gradient of y. `change`: R - I; its transpose for y = R y0."""
    # R's gradient is R (y g^T), and S^T R = S; so Q's gradient is 2 S (y g^T) S^T, and S = I + (R - I) / 2
    half = torch.baddbmm(products, change, products, beta=2)
    q_grad = torch.baddbmm(half, half, change.mT, alpha=0.5)
    return q_grad - q_grad.mT


def constrain(blocks: Tensor, constraint: float) -> Tensor:
    """Return blocks whose skew matrices have a Frobenius norm of at most `constraint`.

    The norm is taken over all blocks of a layer. 0: return the blocks themselves."""
    if not constraint:
        return blocks
    skew = blocks - blocks.mT
    norm = skew.square().sum().clamp_min(1e-24).sqrt() + 1e-8
    return blocks * (constraint / norm).clamp_max(1.0)


def add_blocks(
    op: LayerOp,
    y: Tensor,
    matrices: Tensor,
    x: Tensor,
) -> None:
    """Add `matrices` (blocks, b, b) times `x`, over blocks of channels, to `y` in place.

    `x` and `y` are outputs of the layer."""
    if is_channels_last(op, y):
        put_token_blocks(op, y, matrices, x, beta=1)
        return
    image_matrices = repeat_for_images(matrices, y)
    x_blocks = image_blocks(x, matrices)
    if y.is_contiguous():
        y_blocks = y.view(x_blocks.shape)
        y_blocks.baddbmm_(image_matrices, x_blocks)
    else:
        change = torch.bmm(image_matrices, x_blocks)
        y.add_(change.view(y.shape))


def repeat_for_images(matrices: Tensor, x: Tensor) -> Tensor:
    """Return `matrices` (blocks, b, b) once per image: (B * blocks, b, b)."""
    num_blocks, side, _ = matrices.shape
    batch_size = x.shape[0]
    expanded = matrices.expand(batch_size, num_blocks, side, side)
    return expanded.reshape(-1, side, side)


def image_blocks(x: Tensor, matrices: Tensor) -> Tensor:
    """Return images (B, C, *spatial) as (B * blocks, b, positions)."""
    num_blocks, side, _ = matrices.shape
    batch_size = x.shape[0]
    return x.reshape(batch_size * num_blocks, side, num_positions(x))


def token_blocks(
    op: LayerOp,
    x: Tensor,
    num_blocks: int,
    side: int,
) -> Tensor:
    """Return an output that is a matrix (tokens, channels) in memory as (blocks, tokens, b)."""
    return tokens_by_channels(op, x).view(-1, num_blocks, side).transpose(0, 1)


def put_token_blocks(
    op: LayerOp,
    y: Tensor,
    matrices: Tensor,
    x: Tensor,
    beta: int,
) -> None:
    """Set y = beta y + `matrices` x for outputs that are matrices (tokens, channels) in memory."""
    num_blocks, side, _ = matrices.shape
    x_blocks = token_blocks(op, x, num_blocks, side)
    if torch.compiler.is_compiling():  # it loses the strides of a transposed view that is written
        changes = torch.bmm(x_blocks, matrices.mT)
        change = changes.transpose(0, 1).reshape(-1, num_blocks * side)
        y_matrix = tokens_by_channels(op, y)
        y_matrix.mul_(beta).add_(change)
    else:
        y_blocks = token_blocks(op, y, num_blocks, side)
        y_blocks.baddbmm_(x_blocks, matrices.mT, beta=beta)


def rotate_blocks(op: LayerOp, x: Tensor, changes: Tensor) -> Tensor:
    """Return (I + `changes`) times `x`, over blocks of channels. `changes`: in the dtype of `x`.

    I + changes is not formed in a narrow dtype, where it would be rounded to I."""
    if x.dtype not in WIDE_DTYPES:
        rotated = x.clone()
        add_blocks(op, rotated, changes, x)
        return rotated
    side = changes.shape[-1]
    identity = torch.eye(side, dtype=changes.dtype, device=changes.device)
    matrices = changes + identity
    if is_channels_last(op, x):
        is_compiling = torch.compiler.is_compiling()
        rotated = torch.zeros_like(x) if is_compiling else torch.empty_like(x)
        put_token_blocks(op, rotated, matrices, x, beta=0)
        return rotated
    image_matrices = repeat_for_images(matrices, x)
    rotated_blocks = torch.bmm(image_matrices, image_blocks(x, matrices))
    return rotated_blocks.view(x.shape)


def block_products(
    op: LayerOp,
    y: Tensor,
    x: Tensor,
    side: int,
) -> Tensor:
    """Return the sum over positions of y x^T, per block of channels: (blocks, b, b)."""
    num_blocks = y.shape[op.channel_axis] // side
    if is_channels_last(op, y):
        y_blocks = token_blocks(op, y, num_blocks, side)
        x_blocks = token_blocks(op, x, num_blocks, side)
        return torch.bmm(y_blocks.mT, x_blocks)
    batch_size = y.shape[0]
    y_blocks = y.reshape(batch_size * num_blocks, side, num_positions(y))
    x_blocks = x.reshape(batch_size * num_blocks, side, num_positions(x))
    products = torch.bmm(y_blocks, x_blocks.mT)
    return products.view(batch_size, num_blocks, side, side).sum(0)


def without_bias(op: LayerOp, y: Tensor, bias: Tensor | None) -> Tensor:
    """Return `y` less the bias, in a new tensor that is dense in memory."""
    if bias is None:
        return y.clone()
    bias_view = op.channel_view(bias.to(y.dtype))
    return y - bias_view
