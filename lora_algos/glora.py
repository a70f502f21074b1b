"""GLoRA: dW = scaling * (W a1 a2 + b1 b2): a LoRA on the layer's input and a LoRA beside it (Chavan
et al. 2023, arXiv 2306.07967; the form of LyCORIS and ComfyUI).

Shapes, for a weight (out, in, *kernel): a1.weight (in, rank, 1...), a2.weight (rank, in, 1...),
b1.weight (out, rank, 1...), b2.weight (rank, in, *kernel). a2 and b2 start at zero.

On activations: y = W (x + scaling a1 a2 x) + scaling b1 b2 x.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_algos.adapter import OwnAdapter
from lora_algos.config import LayerSpec
from lora_algos.kernels import Kernel, Saved, Tensors
from lora_algos.layer_op import LayerOp
from lora_algos.low_rank import add_low_rank, low_rank_grads
from lora_algos.tensors import Shapes, fitted, rank_and_alpha


@dataclass(frozen=True)
class InputAndBeside(Kernel):
    """Factors (a1, a2, b1, b2)."""

    def delta(self, weight: Tensor, factors: Tensors) -> Tensor:
        a1, a2, b1, b2 = (factor.flatten(1) for factor in factors)
        w = weight.to(a1.dtype).flatten(2) if weight.ndim > 2 else weight.to(a1.dtype)[..., None]
        on_input = torch.einsum("oik,ir,rj->ojk", w, a1, a2)
        return (on_input.reshape(self.shape) + (b1 @ b2).view(self.shape)) * self.scaling

    def _pointwise(self) -> LayerOp:
        """What a1 and a2 are applied with: a Linear layer over the input channels."""
        n = self.op.spatial
        return LayerOp(n, (1,) * n, (0,) * n, (1,) * n)

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensors
    ) -> tuple[Tensor, Tensors]:
        a1, a2, b1, b2 = (factor.to(x.dtype) for factor in factors)
        # added to in place as a matrix of tokens, which a clone with strides of its own is not
        moved = x.clone(
            memory_format=torch.preserve_format if self.op.spatial else torch.contiguous_format
        )
        add_low_rank(self._pointwise(), moved, x, a1, a2, self.scaling)
        y = self.op(moved, weight, bias)
        return y, (x, add_low_rank(self.op, y, x, b1, b2, self.scaling))

    def backward(
        self, grad: Tensor, saved: Saved, input_grad: bool
    ) -> tuple[Tensor | None, Tensors]:
        a1, a2, b1, b2 = (factor.to(grad.dtype) for factor in saved.factors)
        d_moved = self.op.input_grad(grad, saved.weight, saved.shape)
        dx = (
            d_moved if input_grad else None
        )  # added to when all else that needs d_moved is computed
        da = low_rank_grads(self._pointwise(), d_moved, saved.x, (a1, a2, self.scaling), dx, None)
        db = low_rank_grads(self.op, grad, saved.x, (b1, b2, self.scaling), dx, saved.kept[0])
        return dx, (*da, *db)

    def by_factors(self, factors: Tensors) -> bool:
        # a1 a2 stands before the groups of a grouped convolution, which share it in the formula
        return self.op.groups == 1


class GLoRA(OwnAdapter):
    """A layer with a GLoRA."""

    algorithm = "GLoRA"
    detected_by = ("a1.weight",)
    rank_axis = {"a2.weight": 0, "b2.weight": 0}  # noqa: RUF012
    starts_at_zero = ("a2.weight", "b2.weight")
    own_options = ("rslora",)

    @classmethod
    def shapes(cls, spec: LayerSpec, weight: torch.Size) -> Shapes:
        (out, channels, *kernel), r = weight, spec.rank
        ones = [1] * len(kernel)
        return {
            "a1.weight": (channels, r, *ones),
            "a2.weight": (r, channels, *ones),
            "b1.weight": (out, r, *ones),
            "b2.weight": (r, channels, *kernel),
        }

    @classmethod
    def make_kernel(
        cls, op: LayerOp, spec: LayerSpec, weight: torch.Size, names: Iterable[str]
    ) -> Kernel:
        return InputAndBeside(op, weight, spec.scaling)

    @classmethod
    def read_spec(cls, tensors: dict[str, Tensor], weight: torch.Size) -> tuple[LayerSpec, Shapes]:
        spec = LayerSpec(*rank_and_alpha(tensors), cls.algorithm)
        return spec, fitted(tensors, cls.shapes(spec, weight), weight)

    @classmethod
    def initialize(cls, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name in cls.starts_at_zero:
                nn.init.zeros_(tensor)
            else:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


ADAPTER = GLoRA
