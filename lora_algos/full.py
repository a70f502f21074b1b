"""Full: dW is a matrix of its own, `.diff` (out, in, *kernel), zero at first. As much to train as
the weight itself."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_algos.adapter import Adapter, OwnAdapter
from lora_algos.config import LayerSpec
from lora_algos.kernels import WIDE, DenseKernel, Kernel, Saved, Tensors
from lora_algos.layer_op import ADAPTED_TYPES, LayerOp, without_autocast
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
            return NormDifference(base_layer, spec, shapes)
        return cls(base_layer, spec, shapes)

    @classmethod
    def shapes(cls, spec: LayerSpec, weight: torch.Size) -> Shapes:
        return {"diff": tuple(weight)}

    @classmethod
    def make_kernel(
        cls, op: LayerOp, spec: LayerSpec, weight: torch.Size, names: Iterable[str]
    ) -> Kernel:
        return Difference(op, weight, 1.0)

    @classmethod
    def read_spec(cls, tensors: dict[str, Tensor], weight: torch.Size) -> tuple[LayerSpec, Shapes]:
        spec = LayerSpec(algorithm=cls.algorithm)
        return spec, fitted(tensors, cls.shapes(spec, weight), weight)

    def size(self, scaling: str) -> str:
        return "every weight"

    @classmethod
    def initialize(cls, tensors: dict[str, Tensor]) -> None:
        tensors["diff"].zero_()


ADAPTER = Full


class NormDifference(Full):
    """A normalization layer whose weight is trained."""

    def setup(self, base_layer: nn.Module, spec: LayerSpec) -> None:
        weight, bias = base_layer.weight, getattr(base_layer, "bias", None)
        self.spec, self.op, self.unmerged, self.diff_b = spec, LayerOp(0), None, None
        self.kernel = self.make_kernel(self.op, spec, weight.shape, self.tensors())  # type: ignore[arg-type]
        if spec.bias and bias is not None:
            self.diff_b = nn.Parameter(torch.zeros_like(bias, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        if self.unmerged is not None:
            return self.base_layer(x)
        weight, bias = self.base_layer.weight, getattr(self.base_layer, "bias", None)
        wide = x.dtype if x.dtype in WIDE else torch.float32
        tensors = self._masked(dict(self.trained()))
        changed = {"weight": weight.to(wide) + tensors["diff"]}
        if bias is not None:
            changed["bias"] = (
                bias.to(wide) + tensors["diff_b"] if "diff_b" in tensors else bias.to(wide)
            )
        x, dtype = x.to(wide), x.dtype
        if torch.is_grad_enabled() and not x.requires_grad:
            # for a gradient that nobody reads: torch 2.13 dies on CPUs in the backward pass of a
            # channels-last GroupNorm that is to give one for its weight and none for its input
            x = x.detach().requires_grad_()
        with without_autocast(x.device.type):
            y = torch.func.functional_call(self.base_layer, changed, (x,))
        return y.to(dtype)
