"""Rotations of output channels in blocks, for OFT and BOFT: the Cayley transform and its gradient,
and rotating activations.

R = (I + Q) (I - Q)^-1 with Q = B - B^T is orthogonal for any B. With S = (I - Q)^-1: R - I = 2 S Q,
which loses nothing for small Q, and the gradient of Q is 2 S^T G S^T, so one inverse serves both
passes. It is taken of a symmetric matrix, which costs half: S = (I + Q) P with P = (I - Q^2)^-1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_algos.kernels import WIDE
from lora_algos.layer_op import LayerOp, positions
from lora_algos.low_rank import channels_last_rows, is_channels_last


def inverse(matrices: Tensor) -> Tensor:
    """Of symmetric matrices with eigenvalues of at least 1."""
    if matrices.device.type == "cpu":
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrices).L)
    return torch.linalg.inv_ex(matrices).inverse  # inv would ask the device whether there is one


@dataclass(frozen=True)
class Cayley:
    """R - I of blocks (..., b, b), and what its gradient needs: S, and P of which S is made."""

    minus_identity: Tensor
    s: Tensor
    p: Tensor

    @classmethod
    def of(cls, blocks: Tensor, kept: tuple[Tensor, ...] = ()) -> "Cayley":
        """`kept`: what `to_keep` gave for these blocks, which spares the inverse."""
        q = blocks - blocks.mT
        if kept:
            top, corner = kept
            p = torch.cat([top, torch.cat([top[..., top.shape[-2] :].mT, corner], -1)], -2)
        else:
            p = inverse(torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) - q @ q)
        s = p + q @ p
        return cls(2 * s @ q, s, p)

    def to_keep(self) -> tuple[Tensor, ...]:
        """P, which is symmetric, without a quarter of it that stands there twice."""
        half = (self.p.shape[-1] + 1) // 2
        return self.p[..., :half, :].clone(), self.p[..., half:, half:].clone()

    def grad(self, grad: Tensor) -> Tensor:
        """From the gradient of R to that of the blocks."""
        dq = 2 * self.s.mT @ grad @ self.s.mT
        return dq - dq.mT


def constrained(blocks: Tensor, constraint: float) -> Tensor:
    """Blocks whose skew matrices have a Frobenius norm of at most `constraint`, taken over all of a layer's; 0: as
    is."""
    if not constraint:
        return blocks
    norm = (blocks - blocks.mT).square().sum().clamp_min(1e-24).sqrt() + 1e-8
    return blocks * (constraint / norm).clamp_max(1.0)


def add_blocks(op: LayerOp, y: Tensor, matrices: Tensor, x: Tensor) -> None:
    """Adds `matrices` (blocks, b, b) times `x`, over blocks of channels, to `y` in place; both are outputs of the
    layer."""
    b = matrices.shape[-1]
    if is_channels_last(op, y):
        put_blocks(op, y, matrices, x, beta=1)
        return
    every = matrices.expand(y.shape[0], *matrices.shape).reshape(-1, b, b)
    parts = x.reshape(every.shape[0], b, positions(x))
    if y.is_contiguous():
        y.view(parts.shape).baddbmm_(every, parts)
    else:
        y.add_(torch.bmm(every, parts).view(y.shape))


def put_blocks(op: LayerOp, y: Tensor, matrices: Tensor, x: Tensor, beta: int) -> None:
    """y = beta y + `matrices` x for outputs that are matrices (tokens, channels) in memory."""
    blocks, b = matrices.shape[:2]
    flat, flat_x = (channels_last_rows(op, t).view(-1, blocks, b).transpose(0, 1) for t in (y, x))
    if (
        torch.compiler.is_compiling()
    ):  # which loses the strides of a transposed view that is written to
        change = torch.bmm(flat_x, matrices.mT).transpose(0, 1)
        channels_last_rows(op, y).mul_(beta).add_(change.reshape(-1, blocks * b))
    else:
        flat.baddbmm_(flat_x, matrices.mT, beta=beta)


def times_blocks(op: LayerOp, x: Tensor, changes: Tensor) -> Tensor:
    """(I + `changes`) times `x`, over blocks of channels. In a narrow dtype I + changes would be
    rounded to I."""
    if x.dtype not in WIDE:
        turned = x.clone()
        add_blocks(op, turned, changes.to(x.dtype), x)
        return turned
    b = changes.shape[-1]
    matrices = changes + torch.eye(b, dtype=changes.dtype, device=changes.device)
    if is_channels_last(op, x):
        turned = torch.zeros_like(x) if torch.compiler.is_compiling() else torch.empty_like(x)
        put_blocks(op, turned, matrices, x, beta=0)
        return turned
    every = matrices.expand(x.shape[0], *matrices.shape).reshape(-1, b, b)
    return torch.bmm(every, x.reshape(every.shape[0], b, positions(x))).view(x.shape)


def block_products(op: LayerOp, y: Tensor, x: Tensor, b: int) -> Tensor:
    """The sum over positions of y x^T, per block of channels: (blocks, b, b)."""
    if is_channels_last(op, y):
        flat, flat_x = (
            channels_last_rows(op, t).view(-1, y.shape[1 if op.spatial else -1] // b, b)
            for t in (y, x)
        )
        return torch.bmm(flat.permute(1, 2, 0), flat_x.transpose(0, 1))
    blocks = y.shape[1] // b
    flat, flat_x = (t.reshape(t.shape[0] * blocks, b, positions(t)) for t in (y, x))
    return torch.bmm(flat, flat_x.mT).view(y.shape[0], blocks, b, b).sum(0)


def without_bias(op: LayerOp, y: Tensor, bias: Tensor | None) -> Tensor:
    """A new tensor: `y` less the bias, dense in memory."""
    if bias is None:
        return y.clone()
    return y - op.channel_view(bias.to(y.dtype))
