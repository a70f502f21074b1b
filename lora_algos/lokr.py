"""LoKr: dW = scaling * w1 (x) w2, (x) the Kronecker product (LyCORIS, Yeh et al. 2023, arXiv
2309.14859).

Shapes, for a weight (a b, c d, *kernel) with a <= b and c <= d: lokr_w1 (a, c), lokr_w2 (b, d,
*kernel). If the rank is below half the larger side, w2 is lokr_w2_a (b, rank) @ lokr_w2_b (rank,
d * kernel). With decompose_both, w1 has this form too. scaling is alpha / rank, and 1 if neither
factor is decomposed. w2 (or w2_b) starts at zero.

On activations, seen as (c, d) channels, w2 and w1 are applied one after the other. A low-rank w2 is
applied in two halves with w1 between them, where there are only `rank` channels: I (x) w2_a,
w1 (x) I, I (x) w2_b.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import AdapterError, error_list
from lora_algos.algorithm import Algorithm
from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.kernels import Factors, Kernel
from lora_algos.kronecker import Kronecker, LowRankKronecker
from lora_algos.layer_op import LayerOp
from lora_algos.low_rank import lora_tensors, tucker_product
from lora_algos.tensors import LayerTensors, Shapes, check_shapes
from lora_algos.traits import (
    FileTraits,
    Layers,
    PeftTraits,
    RowAxes,
    RowAxis,
    TensorTraits,
    Weights,
)

W1, W1_A, W1_B = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
W2, W2_A, W2_B = "lokr_w2", "lokr_w2_a", "lokr_w2_b"
T2 = "lokr_t2"
"""Core of a w2 in Tucker form, which other programs write."""


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Return (small, large) with small * large == size and small at most `factor` (LyCORIS' rule).

    factor -1: nearest to a square."""
    if factor > 0 and size % factor == 0:
        other_factor = size // factor
        return min(factor, other_factor), max(factor, other_factor)
    limit = math.isqrt(size)
    if factor > 0:
        limit = min(limit, factor)
    small = next(number for number in range(limit, 0, -1) if size % number == 0)
    return small, size // small


def whole_w1(tensors: LayerTensors) -> Tensor:
    """Return w1 (a, c)."""
    return tensors[W1] if W1 in tensors else tensors[W1_A] @ tensors[W1_B]


def row_axes(tensors: LayerTensors, num_rows: int) -> RowAxes:
    """Return the axes of the rows.

    One row of w1 means as many rows of the weight as w2 has, so w2 is common to all units."""
    w1_name = W1 if W1 in tensors else W1_A
    w2_name = W2 if W2 in tensors else W2_A
    if w1_name not in tensors:
        return {}
    unit = num_rows // tensors[w1_name].shape[0]
    return {w1_name: RowAxis(0, unit, unit, w2_name)}


def weight_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of the weight, as a matrix if w2 is decomposed without a core."""
    kernel: tuple[int, ...] = ()
    if W1 in shapes:
        a, c = shapes[W1][:2]
    else:
        a, c = shapes[W1_A][0], shapes[W1_B][1]
    if W2 in shapes:
        b, d = shapes[W2][:2]
        kernel = shapes[W2][2:]
    elif T2 in shapes:
        b, d = shapes[W2_A][1], shapes[W2_B][1]
        kernel = shapes[T2][2:]
    else:
        b, d = shapes[W2_A][0], shapes[W2_B][1]
    return a * b, c * d, *kernel


def import_tensors(tensors: LayerTensors) -> LayerTensors:
    """Return a LoKr whose w2 is in Tucker form as one with a whole w2.

    If w1 is whole, no factor has a rank any more, so the scaling is moved into w2."""
    if T2 not in tensors:
        return tensors
    whole_tensors = dict(tensors)
    core = whole_tensors.pop(T2)
    w2_a = whole_tensors.pop(W2_A)
    w2_b = whole_tensors.pop(W2_B)
    w2 = tucker_product(core, w2_a, w2_b)
    if W1 in tensors:
        w2 = w2 * LoKr.traits.scaling(tensors)
    # torch.kron fails on the strides that einsum makes; ComfyUI then leaves the layer unchanged
    whole_tensors[W2] = w2.contiguous()
    return whole_tensors


def to_lora(tensors: LayerTensors, weight: torch.Size) -> LayerTensors:
    """Return the LoRA of the same function.

    (u1 v1) (x) (u2 v2) = (u1 (x) u2) (v1 (x) v2)."""
    u1, v1 = as_product(tensors, W1)
    u2, v2 = as_product(tensors, W2)
    up, down = torch.kron(u1, u2), torch.kron(v1, v2)
    scaling = LoKr.traits.scaling(tensors)
    return lora_tensors(up * scaling, down, weight)


def as_product(tensors: LayerTensors, name: str) -> tuple[Tensor, Tensor]:
    """Return a Kronecker factor as a product of two matrices.

    A whole factor is split by the identity on its smaller side."""
    if name not in tensors:
        return tensors[f"{name}_a"], tensors[f"{name}_b"]
    matrix = tensors[name].flatten(1)
    num_rows, num_columns = matrix.shape
    side = min(num_rows, num_columns)
    identity = torch.eye(
        side,
        dtype=matrix.dtype,
        device=matrix.device,
    )
    if num_rows <= num_columns:
        return identity, matrix
    return matrix, identity


def rank_of_whole_factors(tensors: LayerTensors) -> int:
    """Return the rank from which PEFT and LyCORIS decompose no factor."""
    return max(tensors[W2].shape[:2])


def peft_options(layers: Layers, weights: Weights) -> dict[str, Any]:
    """Return PEFT's options of a LoKr, with the factor that splits every layer as here.

    Raises AdapterError, naming layers, if no factor does."""
    splits: dict[str, Split] = {}
    for layer, tensors in layers.items():
        splits[layer] = channel_splits(tensors, weights[layer])
    sizes = {small for split in splits.values() for _, small in split}
    candidates = [-1, *sorted(sizes, reverse=True)]
    different_layers: dict[int, list[str]] = {}
    for factor in candidates:
        different_layers[factor] = layers_split_differently(splits, factor)
    best = min(candidates, key=lambda factor: len(different_layers[factor]))
    if different_layers[best]:
        heading = (
            "--export.formats peft: PEFT splits these layers of the LoKr differently, for every "
            f"factor (nearest {best})"
        )
        raise AdapterError(error_list(heading, different_layers[best]))
    decomposes_w1 = any(W1_A in tensors for tensors in layers.values())
    return {
        "decompose_factor": best,
        "decompose_both": decomposes_w1,
        "use_effective_conv2d": False,
    }


Split = tuple[tuple[int, int], tuple[int, int]]
"""(size, first factor) of a weight's output channels, and of its input channels."""


def channel_splits(tensors: LayerTensors, weight: Tensor) -> Split:
    """Return how a layer splits its output and input channels."""
    out, channels = weight.shape[:2]
    a, c = whole_w1(tensors).shape
    return (out, a), (channels, c)


def layers_split_differently(splits: Mapping[str, Split], factor: int) -> list[str]:
    """Return the layers that PEFT splits differently for this factor."""
    from peft.tuners.lokr.layer import factorization as peft_factorization

    return [
        layer
        for layer, (out, channels) in splits.items()
        if peft_factorization(out[0], factor)[0] != out[1]
        or peft_factorization(channels[0], factor)[0] != channels[1]
    ]


class LoKr(Algorithm):
    """The Kronecker product of two matrices; the larger one may have a low rank."""

    name = "LoKr"
    options = ("rslora", "factor", "decompose_both", "full_matrix")
    traits = TensorTraits(
        names=(W1, W1_A, W1_B, W2, W2_A, W2_B),
        detected_by=(W1, W1_A),
        groups=((W1_A, W1_B), (W2_A, W2_B)),
        needs={T2: W2_A},
        rank_axes={W2_B: 0, W1_B: 0},
        rank_of_whole_factors=rank_of_whole_factors,
        dropout_axes={W2: 0, W2_B: 0},
        row_axes=row_axes,
        weight_shape=weight_shape,
        to_lora=to_lora,
        files=FileTraits(
            foreign_names=(T2,),
            import_tensors=import_tensors,
            peft=PeftTraits("LOKR", options=peft_options, scaled_tensor=W1),
        ),
    )

    def shapes(self, spec: LayerSpec, weight: torch.Size) -> Shapes:
        out, channels, *kernel = weight
        rank, options = spec.rank, spec.options
        a, b = factorization(out, options.factor)
        c, d = factorization(channels, options.factor)
        decomposes_w1 = options.decompose_both and rank < max(a, c) / 2
        decomposes_w2 = rank < max(b, d) / 2
        shapes: Shapes = {}
        if decomposes_w1 and not options.full_matrix:
            shapes[W1_A] = (a, rank)
            shapes[W1_B] = (rank, c)
        else:
            shapes[W1] = (a, c)
        if decomposes_w2 and not options.full_matrix:
            shapes[W2_A] = (b, rank)
            shapes[W2_B] = (rank, d * math.prod(kernel))
        else:
            shapes[W2] = (b, d, *kernel)
        return shapes

    def read_spec(
        self,
        tensors: LayerTensors,
        weight: torch.Size,
    ) -> tuple[LayerSpec, Shapes]:
        out, channels, *kernel = weight
        rank, alpha = self.traits.rank_and_alpha(tensors)
        a, c = self._w1_sides(tensors, weight)
        b, d = out // a, channels // c
        shapes: Shapes = {}
        if W1_A in tensors:
            shapes[W1_A] = (a, rank)
            shapes[W1_B] = (rank, c)
        else:
            shapes[W1] = (a, c)
        if W2_A in tensors:
            shapes[W2_A] = (b, rank)
            shapes[W2_B] = (rank, d * math.prod(kernel))
        else:
            shapes[W2] = (b, d, *kernel)
        check_shapes(tensors, shapes, weight)
        has_rank = self.traits.rank(tensors) is not None
        options = AdapterOptions(decompose_both=W1_A in tensors, full_matrix=not has_rank)
        return LayerSpec(rank, alpha, self.name, options), shapes

    def _w1_sides(self, tensors: LayerTensors, weight: torch.Size) -> tuple[int, int]:
        """Return the sides of w1. Raises AdapterError unless they divide those of the weight."""
        out, channels = weight[:2]
        shapes = [tuple(tensors[name].shape) for name in (W1, W1_A, W1_B) if name in tensors]
        sides = (0, 0)
        if shapes and all(len(shape) >= 2 for shape in shapes):
            sides = shapes[0][0], shapes[-1][-1]
        a, c = sides
        if not a or not c or out % a or channels % c:
            raise AdapterError(f"{W1} of {shapes} does not divide a weight of {tuple(weight)}")
        return sides

    def make_kernel(
        self,
        op: LayerOp,
        spec: LayerSpec,
        weight: torch.Size,
        names: Iterable[str],
    ) -> Kernel:
        if {*names} == {W1, W2}:
            # ComfyUI, LyCORIS and A1111 ignore the alpha of such files
            return Kronecker(op, weight, 1.0)
        if W2 in names:
            return Kronecker(op, weight, spec.scaling)
        return LowRankKronecker(op, weight, spec.scaling)

    def initialize(self, tensors: LayerTensors) -> None:
        """Fill new tensors: zeros in w2 or w2_b, the others as PEFT's LoRA."""
        for name, tensor in tensors.items():
            if name in (W2, W2_B):
                nn.init.zeros_(tensor)
            else:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))

    def factors(self, tensors: LayerTensors, spec: LayerSpec) -> Factors:
        if W2 in tensors:
            return whole_w1(tensors), tensors[W2]
        return whole_w1(tensors), tensors[W2_A], tensors[W2_B]

    def describe_size(
        self,
        spec: LayerSpec,
        shapes: Shapes,
        scaling: str,
    ) -> str:
        if shapes.keys() == {W1, W2}:
            return "whole factors, scaling = 1"
        return super().describe_size(spec, shapes, scaling)


ALGORITHM = LoKr()
