"""OFT: W' = R^T W, R block-diagonal and orthogonal over the output channels (Qiu et al. 2023, arXiv
2306.07280; the form of LyCORIS, ComfyUI and kohya). The bias is not rotated.

Shapes, for a weight (out, in, *kernel): oft_blocks (out / b, b, b), zero at first, b the largest
divisor of out up to block_size. R = (I + Q) (I - Q)^-1, Q = B - B^T.

On activations: the output less its bias is rotated. For the backward pass the output is kept, which
the next layer mostly keeps too and from which the output before the rotation follows, and three
quarters of an inverse of the blocks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from common.errors import AdapterError
from lora_algos.adapter import OwnAdapter
from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.kernels import WIDE, Kernel, Saved, Tensors
from lora_algos.layer_op import LayerOp, channel_sum
from lora_algos.rotation import Cayley, add_blocks, block_products, constrained, without_bias
from lora_algos.tensors import Shapes, constraint_of, fitted


def block_side(channels: int, limit: int) -> int:
    """The largest divisor of `channels` up to `limit`; AdapterError if that is 1, which leaves
    nothing to rotate."""
    side = next(n for n in range(min(limit, channels), 0, -1) if channels % n == 0)
    if side == 1:
        fitting = next((n for n in range(2, channels + 1) if channels % n == 0), None)
        hint = f"the smallest block_size that does is {fitting}" if fitting else "none does"
        raise AdapterError(
            f"no block_size up to {limit} divides its {channels} output channels; {hint}"
        )
    return side


def biased_products(
    op: LayerOp, y: Tensor, grad: Tensor, bias: Tensor | None, blocks: Tensor
) -> Tensor:
    """The sum over positions of (y - bias) grad^T per block, in the blocks' dtype."""
    side = blocks.shape[-1]
    if bias is None or y.dtype not in WIDE:  # where y is rounded, the bias goes first
        y = y if bias is None else without_bias(op, y, bias)
        return block_products(op, y, grad, side).to(blocks.dtype)
    outer = bias.view(-1, side, 1) * channel_sum(op, grad, blocks.dtype).view(-1, 1, side)
    return block_products(op, y, grad, side).to(blocks.dtype) - outer


@dataclass(frozen=True)
class BlockRotation(Kernel):
    """Factors (blocks,)."""

    def delta(self, weight: Tensor, factors: Tensors) -> Tensor:
        (blocks,) = factors
        change = Cayley.of(blocks).minus_identity
        parts = weight.to(blocks.dtype).reshape(blocks.shape[0], blocks.shape[1], -1)
        return (change.mT @ parts).view(self.shape)

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensors
    ) -> tuple[Tensor, Tensors]:
        y = self.op(x, weight, bias)
        cayley = Cayley.of(factors[0])
        add_blocks(self.op, y, cayley.minus_identity.to(y.dtype).mT, without_bias(self.op, y, bias))
        return y, (y, *cayley.to_keep())

    def backward(
        self, grad: Tensor, saved: Saved, input_grad: bool
    ) -> tuple[Tensor | None, Tensors]:
        (blocks,), bias = saved.factors, saved.bias
        cayley = Cayley.of(blocks, saved.kept)
        # y = R^T y0, so y0 = R y, and the gradient of R is y0 g^T = R (y g^T)
        products = biased_products(self.op, saved.x, grad, bias, blocks)
        dblocks = cayley.grad(products + cayley.minus_identity @ products)
        if not input_grad:
            return None, (dblocks,)
        unrotated = grad.clone()
        add_blocks(self.op, unrotated, cayley.minus_identity.to(grad.dtype), grad)
        return self.op.input_grad(unrotated, saved.weight, saved.shape), (dblocks,)

    def by_factors(self, factors: Tensors) -> bool:
        """Whether rotating outputs is rotating rows of the weight: no block mixes two groups of a
        convolution."""
        return self.op.groups == 1 or (self.shape[0] // self.op.groups) % factors[0].shape[-1] == 0


class OFT(OwnAdapter):
    """A layer with an OFT."""

    algorithm = "OFT"
    detected_by = ("oft_blocks",)
    rank_axis = {"oft_blocks": 0}  # noqa: RUF012
    multiplicative = True
    own_options: ClassVar[tuple[str, ...]] = ("block_size", "constraint")

    @classmethod
    def detects(cls, tensors: dict[str, Tensor]) -> bool:
        return "oft_blocks" in tensors and tensors["oft_blocks"].ndim == 3

    @classmethod
    def shapes(cls, spec: LayerSpec, weight: torch.Size) -> Shapes:
        side = block_side(weight[0], spec.options.block_size)
        return {"oft_blocks": (weight[0] // side, side, side)}

    @classmethod
    def make_kernel(
        cls, op: LayerOp, spec: LayerSpec, weight: torch.Size, names: Iterable[str]
    ) -> Kernel:
        return BlockRotation(op, weight, 1.0)

    @classmethod
    def factors_of(cls, tensors: dict[str, Tensor], spec: LayerSpec) -> Tensors:
        blocks = tensors[
            "oft_blocks"
        ]  # bf16 where FSDP or the user casts it, which has no inverse of a matrix
        return (
            constrained(
                blocks if blocks.dtype in WIDE else blocks.float(), spec.options.constraint
            ),
        )

    @classmethod
    def read_spec(cls, tensors: dict[str, Tensor], weight: torch.Size) -> tuple[LayerSpec, Shapes]:
        blocks = tensors["oft_blocks"]
        sides = tuple(blocks.shape)
        if len(sides) != 3 or sides[1] != sides[2] or sides[0] * sides[1] != weight[0]:
            raise AdapterError(
                f"oft_blocks is {sides}, which does not tile {weight[0]} output channels"
            )
        options = AdapterOptions(block_size=max(2, sides[1]), constraint=constraint_of(tensors))
        return LayerSpec(algorithm=cls.algorithm, options=options), fitted(
            tensors, {"oft_blocks": sides}, weight
        )

    @classmethod
    def initialize(cls, tensors: dict[str, Tensor]) -> None:
        tensors["oft_blocks"].zero_()

    def size(self, scaling: str) -> str:
        *stages, blocks, side, _ = self.tensors()["oft_blocks"].shape
        constraint = self.spec.options.constraint
        bound = f", together at most {constraint:g} away from the identity" if constraint else ""
        return f"{stages[0] if stages else 1} x {blocks} blocks of {side}{bound}"

    def in_file(self) -> tuple[dict[str, Tensor], float]:
        """With the constraint worked in: programs differ in what they take a file's alpha for, but
        not for 0."""
        tensors, _ = super().in_file()
        blocks = constrained(tensors["oft_blocks"], self.spec.options.constraint)
        if self.spec.options.constraint:
            tensors["oft_blocks"] = blocks
        return tensors, 0.0

    def alpha_in_file(self) -> float:
        return self.spec.options.constraint


ADAPTER = OFT
