"""Full: dW is a separate matrix, `diff` (out, in, *kernel), zero at first. It has as many trained
numbers as the weight. Full also adapts the weights of normalization layers."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.precision import without_autocast
from lora_algos.algorithm import Algorithm
from lora_algos.config import LayerSpec
from lora_algos.frozen_weight import frozen_weight
from lora_algos.kernels import (
    WIDE_DTYPES,
    DeltaOnlyKernel,
    Factors,
    Gradients,
    Kernel,
    SavedTensors,
)
from lora_algos.layer_op import ADAPTED_TYPES, LayerOp
from lora_algos.standard_layer import StandardLayer
from lora_algos.tensors import BIAS, LayerTensors, Shapes, check_shapes
from lora_algos.traits import FileTraits, TensorTraits, first_axes

DIFF = "diff"


@dataclass(frozen=True)
class Difference(DeltaOnlyKernel):
    """Factors (diff,)."""

    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        (diff,) = factors
        return diff

    def merged_or_dense_grads(self, grad: Tensor, saved: SavedTensors) -> Gradients:
        return (self.op.weight_grad(grad, saved.activation, self.shape),)


def weight_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of the weight."""
    return shapes[DIFF]


class Full(Algorithm):
    """A matrix of the weight's shape."""

    name = "Full"
    traits = TensorTraits(
        names=(DIFF,),
        detected_by=(DIFF,),
        vectors=(DIFF,),
        dropout_axes={DIFF: 0},
        adapts_norms=True,
        row_axes=first_axes(DIFF),
        weight_shape=weight_shape,
        has_exact_weight_shape=True,
        files=FileTraits(writes_alpha=False),
    )

    def shapes(self, spec: LayerSpec, weight: torch.Size) -> Shapes:
        return {DIFF: tuple(weight)}

    def read_spec(self, tensors: LayerTensors, weight: torch.Size) -> tuple[LayerSpec, Shapes]:
        spec = LayerSpec(algorithm=self.name)
        shapes = self.shapes(spec, weight)
        check_shapes(tensors, shapes, weight)
        return spec, shapes

    def make_kernel(
        self,
        op: LayerOp,
        spec: LayerSpec,
        weight: torch.Size,
        names: Iterable[str],
    ) -> Kernel:
        return Difference(op, weight, 1.0)

    def initialize(self, tensors: LayerTensors) -> None:
        tensors[DIFF].zero_()

    def describe_size(
        self,
        spec: LayerSpec,
        shapes: Shapes,
        scaling: str,
    ) -> str:
        return "every weight"

    def layer_class(self, base_layer: nn.Module) -> Callable[..., nn.Module] | None:
        return None if isinstance(base_layer, ADAPTED_TYPES) else NormLayer


class NormLayer(StandardLayer):
    """A normalization layer whose weight is trained, for the layers of all libraries."""

    def _adapted_forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the changed weight and bias, computed in fp32 or wider."""
        if self.unmerged is not None:
            return self.base_layer(x)
        dtype = x.dtype
        wide_dtype = dtype if dtype in WIDE_DTYPES else torch.float32
        tensors = self.masked_tensors(dict(self.trained_tensors()))
        weight = frozen_weight(self.base_layer, wide_dtype)
        changed_parameters = {"weight": weight + tensors[DIFF]}
        bias = getattr(self.base_layer, "bias", None)
        if bias is not None:
            changed_bias = bias.to(wide_dtype)
            if BIAS in tensors:
                changed_bias = changed_bias + tensors[BIAS]
            changed_parameters["bias"] = changed_bias
        x = x.to(wide_dtype)
        if torch.is_grad_enabled() and not x.requires_grad:
            # torch 2.13 crashes on CPUs in the backward pass of a channels-last GroupNorm that
            # needs a gradient for its weight and none for its input, so it computes both
            x = x.detach().requires_grad_()
        with without_autocast(x.device.type):
            y = torch.func.functional_call(self.base_layer, changed_parameters, (x,))
        return y.to(dtype)


ALGORITHM = Full()
