"""A second algorithm of the tests, dW = u @ v of rank 1, which states only what it must.

Register it with `monkeypatch.setitem(ALGORITHMS, "PlainToy", "helpers.toy_plain")`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_algos.algorithm import Algorithm
from lora_algos.config import LayerSpec
from lora_algos.kernels import DeltaOnlyKernel, Factors, Kernel
from lora_algos.layer_op import LayerOp
from lora_algos.tensors import LayerTensors, Shapes
from lora_algos.traits import TensorTraits

U, V = "plain_u", "plain_v"


@dataclass(frozen=True)
class OuterProduct(DeltaOnlyKernel):
    """Factors (u, v)."""

    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        u, v = factors
        return (u @ v).view(self.shape)


class PlainToy(Algorithm):
    """The toy with the traits that are required."""

    name = "PlainToy"
    traits = TensorTraits(names=(U, V), detected_by=(U,), dropout_axes={V: 0})

    def shapes(self, spec: LayerSpec, weight: torch.Size) -> Shapes:
        return {U: (weight[0], 1), V: (1, weight[1:].numel())}

    def make_kernel(
        self, op: LayerOp, spec: LayerSpec, weight: torch.Size, names: Iterable[str]
    ) -> Kernel:
        return OuterProduct(op, weight, 1.0)

    def initialize(self, tensors: LayerTensors) -> None:
        nn.init.zeros_(tensors[U])
        nn.init.normal_(tensors[V])


ALGORITHM = PlainToy()
