"""OFT: W' = R^T W, with R block-diagonal and orthogonal over the output channels (Qiu et al. 2023,
arXiv 2306.07280; the form of LyCORIS, ComfyUI and kohya). The bias is not rotated.

Shapes, for a weight (out, in, *kernel): oft_blocks (out / b, b, b), zero at first, with b the
largest divisor of out up to block_size. R = (I + Q) (I - Q)^-1, Q = B - B^T.

On activations: the output less its bias is rotated. The backward pass needs the output. The next
layer mostly saves the output too, and the output before the rotation follows from it.

A file holds the constraint as alpha; 0 leaves the rotation free. LyCORIS' constraint is per output
channel, ComfyUI's is that of the whole layer. So files are written with alpha 0 and constrained
blocks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from common.errors import AdapterError
from lora_algos.algorithm import Algorithm
from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.kernels import WIDE_DTYPES, Factors, Gradients, Kernel, Prepared, SavedTensors
from lora_algos.layer_op import LayerOp, channel_sums
from lora_algos.rotation import (
    add_blocks,
    block_products,
    cayley_change,
    cayley_grad,
    constrain,
    without_bias,
)
from lora_algos.tensors import ALPHA, LayerTensors, Shapes, check_shapes
from lora_algos.traits import FileTraits, RowAxes, RowAxis, TensorTraits

BLOCKS = "oft_blocks"


def block_side(channels: int, max_side: int) -> int:
    """Return the largest divisor of `channels` up to `max_side`.

    Raises AdapterError if that is 1, which leaves nothing to rotate."""
    limit = min(max_side, channels)
    side = next(number for number in range(limit, 0, -1) if channels % number == 0)
    if side > 1:
        return side
    divisors = [number for number in range(2, channels + 1) if channels % number == 0]
    hint = f"the smallest block_size that does is {divisors[0]}" if divisors else "none does"
    raise AdapterError(
        f"no block_size up to {max_side} divides its {channels} output channels; {hint}"
    )


def biased_products(
    op: LayerOp,
    y: Tensor,
    grad: Tensor,
    bias: Tensor | None,
    blocks: Tensor,
) -> Tensor:
    """Return the sum over positions of (y - bias) grad^T per block, in the blocks' dtype."""
    side = blocks.shape[-1]
    if bias is not None and y.dtype not in WIDE_DTYPES:
        # y is rounded, so the bias is subtracted first
        y, bias = without_bias(op, y, bias), None
    products = block_products(op, y, grad, side).to(blocks.dtype)
    if bias is None:
        return products
    grad_sums = channel_sums(op, grad, blocks.dtype)
    bias_products = bias.view(-1, side, 1) * grad_sums.view(-1, 1, side)
    return products - bias_products


@dataclass(frozen=True)
class BlockRotation(Kernel):
    """Factors (blocks,)."""

    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        """Return R^T W - W for a weight (out, in, *kernel)."""
        (blocks,) = factors
        num_blocks, side, _ = blocks.shape
        change = cayley_change(blocks)
        wide_weight = weight.to(blocks.dtype)
        weight_blocks = wide_weight.reshape(num_blocks, side, -1)
        return (change.mT @ weight_blocks).view(self.shape)

    def prepare(self, weight: Tensor, factors: Factors, dtype: torch.dtype) -> Prepared:
        """Return R - I."""
        (blocks,) = factors
        return (cayley_change(blocks).to(dtype),)

    def factors_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        prepared: Prepared,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (change,) = prepared
        y = self.op(x, weight, bias)
        start = without_bias(self.op, y, bias)
        add_blocks(self.op, y, change.mT, start)
        return y, (y,)

    def factors_backward(
        self,
        grad: Tensor,
        saved: SavedTensors,
        needs_input_grad: bool,
    ) -> tuple[Tensor | None, Gradients]:
        (blocks,) = saved.factors
        (change,) = saved.prepared
        products = biased_products(self.op, saved.activation, grad, saved.bias, blocks)
        blocks_grad = cayley_grad(products, change.to(products.dtype))
        if not needs_input_grad:
            return None, (blocks_grad,)
        output_grad = grad.clone()
        add_blocks(self.op, output_grad, change, grad)
        input_grad = self.op.input_grad(output_grad, saved.weight, saved.input_shape)
        return input_grad, (blocks_grad,)

    def has_factors_mode(self, factors: Factors) -> bool:
        """Return whether rotating outputs equals rotating the weight's rows.

        No block may mix two groups of a convolution."""
        (blocks,) = factors
        channels_per_group = self.shape[0] // self.op.groups
        return self.op.groups == 1 or channels_per_group % blocks.shape[-1] == 0


def row_axes(tensors: LayerTensors, num_rows: int) -> RowAxes:
    """Return the axis of the blocks, for OFT and BOFT.

    The last stage of a butterfly mixes all rows within 2^(stages - 1) blocks."""
    *stages, _, side, _ = tensors[BLOCKS].shape
    step = side * 2 ** (stages[0] - 1) if stages else side
    return {BLOCKS: RowAxis(len(stages), side, step)}


def weight_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of the weight; blocks do not show its input channels."""
    num_blocks, _, side = shapes[BLOCKS][-3:]
    return num_blocks * side, 1


def portable(tensors: LayerTensors) -> LayerTensors:
    """Return the same rotation without a constraint, which is common to all blocks."""
    blocks = constrain(tensors[BLOCKS], constraint_of(tensors))
    return {**tensors, BLOCKS: blocks, ALPHA: torch.tensor(0.0, dtype=torch.float64)}


def constraint_of(tensors: LayerTensors) -> float:
    """Return the constraint of a rotation in a file; 0: it is free."""
    return max(0.0, float(tensors.get(ALPHA, 0.0)))


def num_output_channels(tensors: LayerTensors) -> int:
    """Return the number of output channels, the divisor of LyCORIS' constraint."""
    num_blocks, side = tensors[BLOCKS].shape[-3:-1]
    return num_blocks * side


ROTATION_FILES = FileTraits(
    portable=portable, default_alpha=0.0, lycoris_alpha_unit=num_output_channels
)


class OFT(Algorithm):
    """A rotation of the output channels in blocks."""

    name = "OFT"
    options: ClassVar[tuple[str, ...]] = ("block_size", "constraint")
    traits = TensorTraits(
        names=(BLOCKS,),
        detected_by=(BLOCKS,),
        dropout_axes={BLOCKS: 0},
        is_multiplicative=True,
        needs_base_weight=True,
        row_axes=row_axes,
        weight_shape=weight_shape,
        files=ROTATION_FILES,
    )

    def matches_tensors(self, tensors: LayerTensors) -> bool:
        return BLOCKS in tensors and tensors[BLOCKS].ndim == 3

    def shapes(self, spec: LayerSpec, weight: torch.Size) -> Shapes:
        side = block_side(weight[0], spec.options.block_size)
        return {BLOCKS: (weight[0] // side, side, side)}

    def read_spec(
        self,
        tensors: LayerTensors,
        weight: torch.Size,
    ) -> tuple[LayerSpec, Shapes]:
        num_blocks, side, last_side = tensors[BLOCKS].shape
        shape = (num_blocks, side, last_side)
        if side != last_side or num_blocks * side != weight[0]:
            raise AdapterError(
                f"{BLOCKS} is {shape}, which does not tile {weight[0]} output channels"
            )
        shapes: Shapes = {BLOCKS: shape}
        check_shapes(tensors, shapes, weight)
        options = AdapterOptions(
            block_size=max(2, side),
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
        return BlockRotation(op, weight, 1.0)

    def initialize(self, tensors: LayerTensors) -> None:
        tensors[BLOCKS].zero_()

    def factors(self, tensors: LayerTensors, spec: LayerSpec) -> Factors:
        blocks = tensors[BLOCKS]
        if blocks.dtype not in WIDE_DTYPES:  # torch has no inverse of bf16 matrices
            blocks = blocks.float()
        return (constrain(blocks, spec.options.constraint),)

    def checkpoint_alpha(self, spec: LayerSpec) -> float:
        return spec.options.constraint

    def describe_size(
        self,
        spec: LayerSpec,
        shapes: Shapes,
        scaling: str,
    ) -> str:
        *stages, num_blocks, side, _ = shapes[BLOCKS]
        num_stages = stages[0] if stages else 1
        text = f"{num_stages} x {num_blocks} blocks of {side}"
        constraint = spec.options.constraint
        if constraint:
            text += f", together at most {constraint:g} away from the identity"
        return text


ALGORITHM = OFT()
