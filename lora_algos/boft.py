"""BOFT: W' = R_m ... R_1 W, each R_i block-diagonal and orthogonal between two butterfly permutations of the output
channels (Liu et al. 2023, arXiv 2311.06243; the form of LyCORIS and ComfyUI). The bias is not rotated.

Shapes, for a weight (out, in, *kernel): oft_blocks (stages, out / b, b, b), zero at first, b even, at most
block_size, and out / b a power of two. Stage i mixes channels within 2^i b of each other.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_algos.base import Shapes, fitted
from lora_algos.config import AdapterError, AdapterOptions, LayerSpec
from lora_algos.kernels import Kernel, Saved, Tensors
from lora_algos.oft import OFT, BlockRotation
from lora_algos.ops import LayerOp
from lora_algos.rotation import Cayley, add_blocks, block_products, without_bias


def butterfly_side(channels: int, limit: int) -> int:
    """The largest even b up to `limit` with channels / b a power of two; AdapterError if there is none."""
    sides = [n for n in range(2, channels + 1, 2) if channels % n == 0 and (channels // n).bit_count() == 1]
    fitting = [n for n in sides if n <= limit]
    if not fitting:
        hint = f"the smallest block_size that fits is {sides[0]}" if sides else "an odd number has no butterfly"
        raise AdapterError(f"no block_size up to {limit} fits its {channels} output channels; {hint}")
    return fitting[-1]


def permuted(x: Tensor, axis: int, stage: int, side: int, inverse: bool = False) -> Tensor:
    """Channels in the order in which a stage's blocks take them: within 2^stage * side, the two halves interleaved."""
    half, axis = 2**stage * (side // 2), axis % x.ndim
    split = x.unflatten(axis, (-1, half, 2) if inverse else (-1, 2, half))
    return split.transpose(axis + 1, axis + 2).reshape(x.shape)


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

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensors) -> tuple[Tensor, Tensors]:
        y = self.op(x, weight, bias)
        y.add_(self._change(without_bias(self.op, y, bias), Cayley.of(factors[0]).minus_identity.to(y.dtype)))
        return y, (y,)

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

    def _in_groups(self, factors: Tensors) -> bool:
        return self.op.groups == 1

    @property
    def _axis(self) -> int:
        return 1 if self.op.spatial else -1

    def backward(self, grad: Tensor, saved: Saved, input_grad: bool) -> tuple[Tensor | None, Tensors]:
        (blocks,), b = saved.factors, saved.factors[0].shape[-1]
        cayley = Cayley.of(blocks)
        y, dblocks = without_bias(self.op, saved.x, saved.bias), torch.empty_like(blocks)
        for stage in reversed(range(blocks.shape[0])):
            change = cayley.minus_identity[stage]
            y, grad = (permuted(t, self._axis, stage, b) for t in (y, grad))
            # y = R y0, so y0 = R^T y, and the gradient of R is g y0^T = (g y^T) R
            products = block_products(self.op, grad, y, b).to(blocks.dtype)
            dblocks[stage] = products + products @ change
            back = change.mT.to(grad.dtype)
            y, grad = (self._back(t, back, stage) for t in (y, grad))
        dx = self.op.input_grad(grad, saved.weight, saved.shape) if input_grad else None
        return dx, (cayley.grad(dblocks),)

    def _back(self, taken: Tensor, change: Tensor, stage: int) -> Tensor:
        turned = taken.clone()
        add_blocks(self.op, turned, change, taken)
        return permuted(turned, self._axis, stage, change.shape[-1], inverse=True)


class BOFT(OFT):
    """A layer with a BOFT."""

    algorithm = "BOFT"
    rank_axis = {"oft_blocks": 1}  # noqa: RUF012

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
            raise AdapterError(f"oft_blocks is {sides}, which is no butterfly over {weight[0]} output channels")
        constraint = max(0.0, float(tensors.get("alpha", 0.0)))
        options = AdapterOptions(block_size=sides[2], stages=sides[0], constraint=constraint)
        return LayerSpec(algorithm=cls.algorithm, options=options), fitted(tensors, {"oft_blocks": sides}, weight)

    @classmethod
    def make_kernel(cls, op: LayerOp, spec: LayerSpec, weight: torch.Size, names: Iterable[str]) -> Kernel:
        return Butterfly(op, weight, 1.0)


ADAPTER = BOFT
