"""An algorithm that exists in the tests alone: dW = scaling * gain o (u @ v), with one gain per row of the weight.

This file and a line in the registry are all that the program knows of it: register it with
`monkeypatch.setitem(ALGORITHMS, "GatedToy", "helpers.toy_algorithm")`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_algos.algorithm import Algorithm
from lora_algos.config import LayerSpec
from lora_algos.kernels import DeltaOnlyKernel, Factors, Kernel
from lora_algos.layer_op import LayerOp
from lora_algos.low_rank import lora_tensors
from lora_algos.tensors import LayerTensors, Shapes
from lora_algos.traits import FileTraits, TensorTraits, first_axes

U, V, GAIN = "toy_u", "toy_v.weight", "toy_gain"


@dataclass(frozen=True)
class GatedProduct(DeltaOnlyKernel):
    """Factors (u, v, gain)."""

    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        u, v, gain = factors
        return (self.scaling * gain[:, None] * (u @ v)).view(self.shape)


def weight_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    return shapes[U][0], shapes[V][1]


def to_lora(tensors: LayerTensors, weight: torch.Size) -> LayerTensors:
    scaling = GatedToy.traits.scaling(tensors)
    return lora_tensors(scaling * tensors[GAIN][:, None] * tensors[U], tensors[V], weight)


class GatedToy(Algorithm):
    """The toy with all traits that fit it."""

    name = "GatedToy"
    traits = TensorTraits(
        names=(U, V, GAIN),
        detected_by=(GAIN,),
        groups=((U, V, GAIN),),
        vectors=(GAIN,),
        rank_axes={V: 0},
        dropout_axes={V: 0},
        starts_at_zero=(U,),
        row_axes=first_axes(U, GAIN),
        factor_pairs=((U, V),),
        weight_shape=weight_shape,
        to_lora=to_lora,
        files=FileTraits(kohya_algo="gated"),
    )

    def shapes(self, spec: LayerSpec, weight: torch.Size) -> Shapes:
        return {
            U: (weight[0], spec.rank),
            V: (spec.rank, weight[1:].numel()),
            GAIN: (weight[0],),
        }

    def make_kernel(
        self, op: LayerOp, spec: LayerSpec, weight: torch.Size, names: Iterable[str]
    ) -> Kernel:
        return GatedProduct(op, weight, spec.scaling)

    def initialize(self, tensors: LayerTensors) -> None:
        nn.init.zeros_(tensors[U])
        nn.init.normal_(tensors[V])
        nn.init.ones_(tensors[GAIN])


ALGORITHM = GatedToy()
