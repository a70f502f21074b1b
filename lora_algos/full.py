"""Full: dW is a matrix of its own, `.diff` (out, in, *kernel), zero at first. As much to train as the weight itself."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_algos.base import Adapter, OwnAdapter
from lora_algos.config import LayerSpec
from lora_algos.kernels import DenseKernel, Kernel, Saved, Tensors
from lora_algos.ops import ADAPTED_TYPES, LayerOp
from lora_algos.tensors import Shapes, fitted


@dataclass(frozen=True)
class Difference(DenseKernel):
    """Factors (diff,)."""

    def delta(self, weight: Tensor, factors: Tensors) -> Tensor:
        return factors[0]

    def dense_grads(self, grad: Tensor, saved: Saved) -> Tensors:
        return (self.op.weight_grad(grad, saved.x, self.shape),)


class Full(OwnAdapter):
    """A layer whose whole weight is trained."""

    algorithm = "Full"
    detected_by = ("diff",)
    rank_axis = {"diff": 0}  # noqa: RUF012

    @classmethod
    def on(cls, base_layer: nn.Module, spec: LayerSpec, shapes: Shapes | None = None) -> Adapter:
        if not isinstance(base_layer, ADAPTED_TYPES):
            from lora_algos.norms import NormDifference  # which is made of this

            return NormDifference(base_layer, spec, shapes)
        return cls(base_layer, spec, shapes)

    @classmethod
    def shapes(cls, spec: LayerSpec, weight: torch.Size) -> Shapes:
        return {"diff": tuple(weight)}

    @classmethod
    def make_kernel(cls, op: LayerOp, spec: LayerSpec, weight: torch.Size, names: Iterable[str]) -> Kernel:
        return Difference(op, weight, 1.0)

    @classmethod
    def read_spec(cls, tensors: dict[str, Tensor], weight: torch.Size) -> tuple[LayerSpec, Shapes]:
        spec = LayerSpec(algorithm=cls.algorithm)
        return spec, fitted(tensors, cls.shapes(spec, weight), weight)

    def size(self, scaling: str) -> str:
        return "every weight"

    @classmethod
    def initialise(cls, tensors: dict[str, Tensor]) -> None:
        tensors["diff"].zero_()


ADAPTER = Full
