"""BOFT: W' = R_m ... R_1 W, each R_i block-diagonal and orthogonal between two butterfly
permutations of the output channels (Liu et al. 2023, arXiv 2311.06243; the form of LyCORIS and
ComfyUI). The bias is not rotated.

Shapes, for a weight (out, in, *kernel): oft_blocks (stages, out / b, b, b), zero at first, b even,
at most block_size, and out / b a power of two. Stage i mixes channels within 2^i b of each other.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import AdapterError
from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.kernels import WIDE, Kernel, Saved, Tensors
from lora_algos.layer_op import LayerOp
from lora_algos.oft import OFT, BlockRotation
from lora_algos.rotation import Cayley, add_blocks, block_products, times_blocks, without_bias
from lora_algos.tensors import Shapes, constraint_of, fitted


def butterfly_side(channels: int, limit: int) -> int:
    """The largest even b up to `limit` with channels / b a power of two; AdapterError if there is
    none."""
    sides = [
        n
        for n in range(2, channels + 1, 2)
        if channels % n == 0 and (channels // n).bit_count() == 1
    ]
    fitting = [n for n in sides if n <= limit]
    if not fitting:
        hint = (
            f"the smallest block_size that fits is {sides[0]}"
            if sides
            else "an odd number has no butterfly"
        )
        raise AdapterError(
            f"no block_size up to {limit} fits its {channels} output channels; {hint}"
        )
    return fitting[-1]


def permuted(x: Tensor, axis: int, stage: int, side: int, inverse: bool = False) -> Tensor:
    """Channels in the order in which a stage's blocks take them: within 2^stage * side, the two
    halves interleaved."""
    half, axis = 2**stage * (side // 2), axis % x.ndim
    split = x.unflatten(axis, (-1, half, 2) if inverse else (-1, 2, half))
    return split.transpose(axis + 1, axis + 2).reshape(x.shape)


def next_stage(x: Tensor, axis: int, half: int) -> Tensor:
    """From the order of a stage whose permutation has this half to the order of the next, in one step; its own
    inverse."""
    axis %= x.ndim
    return x.unflatten(axis, (-1, 2, half, 2)).transpose(axis + 1, axis + 3).reshape(x.shape)


@dataclass(frozen=True)
class Butterfly(BlockRotation):
    """Factors (blocks,)."""

    def delta(self, weight: Tensor, factors: Tensors) -> Tensor:
        (blocks,) = factors
        stages, _, b, _ = blocks.shape
        start = weight.to(blocks.dtype).flatten(1)
        turned = start
        for stage in range(stages):
            taken = permuted(turned, 0, stage, b).reshape(-1, b, start.shape[1])
            rotated = taken + Cayley.of(blocks[stage]).minus_identity @ taken
            turned = permuted(rotated.reshape(start.shape), 0, stage, b, inverse=True)
        return (turned - start).view(self.shape)

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensors
    ) -> tuple[Tensor, Tensors]:
        y = self.op(x, weight, bias)
        changes, before = Cayley.of(factors[0]).minus_identity, without_bias(self.op, y, bias)
        if y.dtype in WIDE:
            y.add_(self._turned(before, changes).sub_(before))  # exactly zero at first
        else:
            y.add_(self._change(before, changes.to(y.dtype)))
        return y, (y,)

    def _turned(self, y: Tensor, changes: Tensor) -> Tensor:
        """All stages on an output; `changes` (stages, blocks, b, b) are R_i - I."""
        b, axis = changes.shape[-1], self._axis
        y = permuted(y, axis, 0, b)
        for stage, change in enumerate(changes):
            y = times_blocks(
                self.op, next_stage(y, axis, 2**stage * b // 4) if stage else y, change
            )
        return permuted(y, axis, changes.shape[0] - 1, b, inverse=True)

    def _change(self, y: Tensor, changes: Tensor) -> Tensor:
        """What all stages add to an output; `changes` (stages, blocks, b, b) are R_i - I. A sum of what each adds,
        because in a narrow dtype a small change of an output would be rounded away."""
        b, axis, total = changes.shape[-1], self._axis, torch.zeros_like(y)
        for stage, change in enumerate(changes):
            taken = permuted(y + total if stage else y, axis, stage, b)
            added = torch.zeros_like(taken)
            add_blocks(self.op, added, change, taken)
            total += permuted(added, axis, stage, b, inverse=True)
        return total

    def by_factors(self, factors: Tensors) -> bool:
        return self.op.groups == 1

    @property
    def _axis(self) -> int:
        return 1 if self.op.spatial else -1

    def backward(
        self, grad: Tensor, saved: Saved, input_grad: bool
    ) -> tuple[Tensor | None, Tensors]:
        (blocks,), b = saved.factors, saved.factors[0].shape[-1]
        cayley = Cayley.of(blocks)
        last, axis, dblocks = blocks.shape[0] - 1, self._axis, torch.empty_like(blocks)
        y = permuted(without_bias(self.op, saved.x, saved.bias), axis, last, b)
        grad = permuted(grad, axis, last, b)
        for stage in range(last, -1, -1):
            change = cayley.minus_identity[stage]
            # y = R y0, so y0 = R^T y, and the gradient of R is g y0^T = (g y^T) R
            products = block_products(self.op, grad, y, b).to(blocks.dtype)
            dblocks[stage] = products + products @ change
            grad = times_blocks(self.op, grad, change.mT)
            if stage:
                y, half = times_blocks(self.op, y, change.mT), 2**stage * b // 4
                y, grad = next_stage(y, axis, half), next_stage(grad, axis, half)
        grad = permuted(grad, axis, 0, b, inverse=True)
        dx = self.op.input_grad(grad, saved.weight, saved.shape) if input_grad else None
        return dx, (cayley.grad(dblocks),)


class BOFT(OFT):
    """A layer with a BOFT."""

    algorithm = "BOFT"
    rank_axis = {"oft_blocks": 1}  # noqa: RUF012
    own_options = ("block_size", "constraint", "stages")

    @classmethod
    def detects(cls, tensors: dict[str, Tensor]) -> bool:
        return "oft_blocks" in tensors and tensors["oft_blocks"].ndim == 4

    @classmethod
    def shapes(cls, spec: LayerSpec, weight: torch.Size) -> Shapes:
        side = butterfly_side(weight[0], spec.options.block_size)
        blocks = weight[0] // side
        most = blocks.bit_length()  # then every channel meets every other
        wanted = spec.options.stages
        if wanted > most:
            raise AdapterError(f"stages {wanted}: {blocks} blocks of {side} have at most {most}")
        return {"oft_blocks": (most if wanted < 1 else wanted, blocks, side, side)}

    @classmethod
    def read_spec(cls, tensors: dict[str, Tensor], weight: torch.Size) -> tuple[LayerSpec, Shapes]:
        sides = tuple(tensors["oft_blocks"].shape)
        fits = len(sides) == 4 and sides[2] == sides[3] and sides[1] * sides[2] == weight[0]
        if not fits or sides[2] % 2 or sides[1] % 2 ** (sides[0] - 1):
            raise AdapterError(
                f"oft_blocks is {sides}, which is no butterfly over {weight[0]} output channels"
            )
        options = AdapterOptions(
            block_size=sides[2], stages=sides[0], constraint=constraint_of(tensors)
        )
        return LayerSpec(algorithm=cls.algorithm, options=options), fitted(
            tensors, {"oft_blocks": sides}, weight
        )

    @classmethod
    def make_kernel(
        cls, op: LayerOp, spec: LayerSpec, weight: torch.Size, names: Iterable[str]
    ) -> Kernel:
        return Butterfly(op, weight, 1.0)


ADAPTER = BOFT
