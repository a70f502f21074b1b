"""GLoRA: dW = scaling * (W a1 a2 + b1 b2), a LoRA on the layer's input and a LoRA next to it
(Chavan et al. 2023, arXiv 2306.07967; the form of LyCORIS and ComfyUI).

Shapes, for a weight (out, in, *kernel): a1.weight (in, rank, 1...), a2.weight (rank, in, 1...),
b1.weight (out, rank, 1...), b2.weight (rank, in, *kernel). a2 and b2 start at zero.

On activations: y = W (x + scaling a1 a2 x) + scaling b1 b2 x.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_algos.algorithm import Algorithm
from lora_algos.config import LayerSpec
from lora_algos.kernels import Factors, Gradients, Kernel, Prepared, SavedTensors, Term
from lora_algos.layer_op import LayerOp
from lora_algos.low_rank import LowRankUpdate, add_low_rank, low_rank_grads, low_rank_terms
from lora_algos.tensors import LayerTensors, Shapes
from lora_algos.traits import TensorTraits, first_axes

A1, A2, B1, B2 = "a1.weight", "a2.weight", "b1.weight", "b2.weight"


@dataclass(frozen=True)
class InputAndOutputLowRank(Kernel):
    """Factors (a1, a2, b1, b2)."""

    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        """Return the update of `weight` (out, in, *kernel)."""
        a1, a2, b1, b2 = (factor.flatten(1) for factor in factors)
        wide_weight = weight.to(a1.dtype)
        if weight.ndim > 2:
            positions_last = wide_weight.flatten(2)
        else:
            positions_last = wide_weight[..., None]
        input_update = torch.einsum("oik,ir,rj->ojk", positions_last, a1, a2)
        output_update = b1 @ b2
        total = input_update.reshape(self.shape) + output_update.view(self.shape)
        return total * self.scaling

    def _pointwise_op(self) -> LayerOp:
        """Return the operation that applies a1 and a2: a Linear layer over the channels."""
        n = self.op.spatial_dims
        return LayerOp(n, (1,) * n, (0,) * n, (1,) * n)

    def terms(self) -> tuple[Term, ...]:
        """Return both updates, one after the other."""
        input_terms = low_rank_terms(self.scaling)
        output_terms = low_rank_terms(self.scaling, first=2)
        return input_terms + output_terms

    def factors_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        prepared: Prepared,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return y = W (x + scaling a1 a2 x) + scaling b1 b2 x, with x, a2 x and b2 x."""
        input_update, output_update = updates(prepared)
        # a matrix of tokens is changed in place, so its copy must be contiguous
        layout = torch.contiguous_format
        if self.op.spatial_dims:
            layout = torch.preserve_format
        changed_x = x.clone(memory_format=layout)
        input_h = add_low_rank(self._pointwise_op(), changed_x, x, input_update)
        y = self.op(changed_x, weight, bias)
        output_h = add_low_rank(self.op, y, x, output_update)
        return y, (x, input_h, output_h)

    def factors_backward(
        self,
        grad: Tensor,
        saved: SavedTensors,
        needs_input_grad: bool,
    ) -> tuple[Tensor | None, Gradients]:
        x = saved.activation
        input_h, output_h = saved.extras
        input_update, output_update = updates(saved.prepared)
        changed_x_grad = self.op.input_grad(grad, saved.weight, saved.input_shape)
        # low_rank_grads reads this gradient before it adds to it
        input_grad = changed_x_grad if needs_input_grad else None
        a_grads = low_rank_grads(
            self._pointwise_op(), changed_x_grad, x, input_update, input_grad, input_h
        )
        b_grads = low_rank_grads(self.op, grad, x, output_update, input_grad, output_h)
        return input_grad, (*a_grads, *b_grads)

    def has_factors_mode(self, factors: Factors) -> bool:
        # in the formula all groups of a convolution share a1 a2
        return self.op.groups == 1


def updates(prepared: Prepared) -> tuple[LowRankUpdate, LowRankUpdate]:
    """Return the updates of the input and of the output."""
    return LowRankUpdate(*prepared[:4]), LowRankUpdate(*prepared[4:])


def weight_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of the weight."""
    return shapes[B1][0], shapes[A1][0], *shapes[B2][2:]


class GLoRA(Algorithm):
    """A LoRA on the input, and a LoRA on the output."""

    name = "GLoRA"
    options = ("rslora",)
    traits = TensorTraits(
        names=(A1, A2, B1, B2),
        detected_by=(A1,),
        groups=((A1, A2, B1, B2),),
        rank_axes={A2: 0},
        dropout_axes={A2: 0, B2: 0},
        starts_at_zero=(A2, B2),
        needs_base_weight=True,
        row_axes=first_axes(B1),
        weight_shape=weight_shape,
        has_exact_weight_shape=True,
    )

    def shapes(self, spec: LayerSpec, weight: torch.Size) -> Shapes:
        """Return the shapes: a1 and a2 change the input, b1 and b2 the output."""
        out, channels, *kernel = weight
        pointwise = [1] * len(kernel)
        rank = spec.rank
        return {
            A1: (channels, rank, *pointwise),
            A2: (rank, channels, *pointwise),
            B1: (out, rank, *pointwise),
            B2: (rank, channels, *kernel),
        }

    def make_kernel(
        self,
        op: LayerOp,
        spec: LayerSpec,
        weight: torch.Size,
        names: Iterable[str],
    ) -> Kernel:
        return InputAndOutputLowRank(op, weight, spec.scaling)

    def initialize(self, tensors: LayerTensors) -> None:
        """Fill new tensors: zeros in one factor of each product, else as PEFT's LoRA."""
        for name, tensor in tensors.items():
            if name in self.traits.starts_at_zero:
                nn.init.zeros_(tensor)
            else:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


ALGORITHM = GLoRA()
