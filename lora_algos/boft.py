"""BOFT: W' = R_m ... R_1 W, each R_i block-diagonal and orthogonal between two butterfly
permutations of the output channels (Liu et al. 2023, arXiv 2311.06243; the form of LyCORIS and
ComfyUI). The bias is not rotated.

Shapes, for a weight (out, in, *kernel): oft_blocks (stages, out / b, b, b), zero at first. b is
even and at most block_size; out / b is a power of two. Stage i mixes channels within 2^i b of each
other.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.errors import AdapterError
from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.kernels import WIDE_DTYPES, Factors, Gradients, Kernel, Prepared, SavedTensors
from lora_algos.layer_op import LayerOp
from lora_algos.oft import (
    BLOCKS,
    OFT,
    BlockRotation,
    constraint_of,
)
from lora_algos.rotation import (
    add_blocks,
    block_products,
    cayley_change,
    cayley_grad,
    rotate_blocks,
    without_bias,
)
from lora_algos.tensors import LayerTensors, Shapes, check_shapes


def is_power_of_two(number: int) -> bool:
    return number.bit_count() == 1


def butterfly_side(channels: int, max_side: int) -> int:
    """Return the largest even b up to `max_side` with channels / b a power of two.

    Raises AdapterError if no side fits."""
    even_divisors = [side for side in range(2, channels + 1, 2) if channels % side == 0]
    sides = [side for side in even_divisors if is_power_of_two(channels // side)]
    fitting_sides = [side for side in sides if side <= max_side]
    if fitting_sides:
        return fitting_sides[-1]
    hint = "an odd number has no butterfly"
    if sides:
        hint = f"the smallest block_size that fits is {sides[0]}"
    raise AdapterError(
        f"no block_size up to {max_side} fits its {channels} output channels; {hint}"
    )


def permute(
    x: Tensor,
    axis: int,
    stage: int,
    side: int,
    inverse: bool = False,
) -> Tensor:
    """Return channels in the order in which the blocks of a stage take them.

    Within each run of 2^stage * side channels, the two halves are interleaved."""
    axis %= x.ndim
    half = 2**stage * (side // 2)
    sides = (-1, half, 2) if inverse else (-1, 2, half)
    split_x = x.unflatten(axis, sides)
    return split_x.transpose(axis + 1, axis + 2).reshape(x.shape)


def permute_to_next(x: Tensor, axis: int, half: int) -> Tensor:
    """Return channels in the order of the next stage, given the order of a stage.

    `half`: the half of that stage's permutation. The step is its own inverse."""
    axis %= x.ndim
    split_x = x.unflatten(axis, (-1, 2, half, 2))
    return split_x.transpose(axis + 1, axis + 3).reshape(x.shape)


@dataclass(frozen=True)
class Butterfly(BlockRotation):
    """Factors (blocks,)."""

    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        """Return the update of `weight` (out, in, *kernel); blocks (stages, out / b, b, b)."""
        (blocks,) = factors
        side = blocks.shape[-1]
        start = weight.to(blocks.dtype).flatten(1)
        rotated = start
        for stage, stage_blocks in enumerate(blocks):
            change = cayley_change(stage_blocks)
            ordered = permute(rotated, 0, stage, side).reshape(-1, side, start.shape[1])
            ordered = ordered + change @ ordered
            rotated = permute(ordered.reshape(start.shape), 0, stage, side, inverse=True)
        return (rotated - start).view(self.shape)

    def factors_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        prepared: Prepared,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (changes,) = prepared
        y = self.op(x, weight, bias)
        start = without_bias(self.op, y, bias)
        if y.dtype in WIDE_DTYPES:
            y.add_(self._rotate(start, changes).sub_(start))  # exactly zero at first
        else:
            y.add_(self._total_change(start, changes))
        return y, (y,)

    def _rotate(self, y: Tensor, changes: Tensor) -> Tensor:
        """Apply all stages to an output.

        `changes` (stages, blocks, b, b): R_i - I."""
        axis = self.op.channel_axis
        num_stages, _, side, _ = changes.shape
        y = permute(y, axis, 0, side)
        for stage, change in enumerate(changes):
            if stage:
                half = 2**stage * side // 4
                y = permute_to_next(y, axis, half)
            y = rotate_blocks(self.op, y, change)
        return permute(y, axis, num_stages - 1, side, inverse=True)

    def _total_change(self, y: Tensor, changes: Tensor) -> Tensor:
        """Return what all stages add to an output, as the sum of the changes of each stage.

        In a narrow dtype, adding a small change to an output would round it away.
        `changes` (stages, blocks, b, b): R_i - I."""
        axis = self.op.channel_axis
        side = changes.shape[-1]
        total = torch.zeros_like(y)
        for stage, change in enumerate(changes):
            stage_input = y + total if stage else y
            ordered = permute(stage_input, axis, stage, side)
            stage_change = torch.zeros_like(ordered)
            add_blocks(self.op, stage_change, change, ordered)
            total += permute(stage_change, axis, stage, side, inverse=True)
        return total

    def has_factors_mode(self, factors: Factors) -> bool:
        return self.op.groups == 1

    def factors_backward(
        self,
        grad: Tensor,
        saved: SavedTensors,
        needs_input_grad: bool,
    ) -> tuple[Tensor | None, Gradients]:
        (blocks,) = saved.factors
        (changes,) = saved.prepared
        op, axis = self.op, self.op.channel_axis
        num_stages, _, side, _ = changes.shape
        last = num_stages - 1
        products = torch.empty_like(blocks)
        y = without_bias(op, saved.activation, saved.bias)
        y = permute(y, axis, last, side)
        grad = permute(grad, axis, last, side)
        for stage in range(last, -1, -1):
            inverse_change = changes[stage].mT
            products[stage] = block_products(op, grad, y, side)
            grad = rotate_blocks(op, grad, inverse_change)
            if stage:
                half = 2**stage * side // 4
                y = rotate_blocks(op, y, inverse_change)
                y = permute_to_next(y, axis, half)
                grad = permute_to_next(grad, axis, half)
        grad = permute(grad, axis, 0, side, inverse=True)
        input_grad = None
        if needs_input_grad:
            input_grad = op.input_grad(grad, saved.weight, saved.input_shape)
        wide_changes = changes.to(blocks.dtype).flatten(0, 1)
        blocks_grad = cayley_grad(products.flatten(0, 1), wide_changes.mT)
        return input_grad, (blocks_grad.view(blocks.shape),)


class BOFT(OFT):
    """A rotation of the output channels in butterfly stages."""

    name = "BOFT"
    options = ("block_size", "constraint", "stages")
    traits = replace(OFT.traits, dropout_axes={BLOCKS: 1})

    def matches_tensors(self, tensors: LayerTensors) -> bool:
        return BLOCKS in tensors and tensors[BLOCKS].ndim == 4

    def shapes(self, spec: LayerSpec, weight: torch.Size) -> Shapes:
        channels = weight[0]
        side = butterfly_side(channels, spec.options.block_size)
        num_blocks = channels // side
        # so many stages mix every channel with every other one
        max_stages = num_blocks.bit_length()
        num_stages = spec.options.stages
        if num_stages > max_stages:
            raise AdapterError(
                f"stages {num_stages}: {num_blocks} blocks of {side} have at most {max_stages}"
            )
        if num_stages < 1:
            num_stages = max_stages
        return {BLOCKS: (num_stages, num_blocks, side, side)}

    def read_spec(self, tensors: LayerTensors, weight: torch.Size) -> tuple[LayerSpec, Shapes]:
        shape = tuple(tensors[BLOCKS].shape)
        num_stages, num_blocks, side, last_side = shape
        tiles_channels = side == last_side and num_blocks * side == weight[0]
        is_even = side % 2 == 0
        has_whole_stages = num_blocks % 2 ** (num_stages - 1) == 0
        if not (tiles_channels and is_even and has_whole_stages):
            raise AdapterError(
                f"{BLOCKS} is {shape}, which is not a butterfly over {weight[0]} output channels"
            )
        shapes: Shapes = {BLOCKS: shape}
        check_shapes(tensors, shapes, weight)
        options = AdapterOptions(
            block_size=side,
            stages=num_stages,
            constraint=constraint_of(tensors),
        )
        return LayerSpec(algorithm=self.name, options=options), shapes

    def make_kernel(
        self,
        op: LayerOp,
        spec: LayerSpec,
        weight: torch.Size,
        names: Iterable[str],
    ) -> Kernel:
        return Butterfly(op, weight, 1.0)


ALGORITHM = BOFT()
