"""DoRA: W' = m V / ||V||, V = W + (alpha / rank) * up @ down, with one norm and one magnitude m per
output channel (Liu et al. 2024, arXiv 2402.09353), in PEFT's layers. As there, no gradient flows
through the norm.

Shapes: as LoRA's, and the magnitude (out), PEFT's `lora_magnitude_vector`. m starts at ||W||, so at
first W' = W.

On activations: y = k (V x) + b with k = m / ||V||, and ||V||^2 from products of thin matrices,
||W||^2 being known. The input and the output are kept for the backward pass; the output gives the
gradient of m.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.lora import layer as peft_lora
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from common.errors import AdapterError
from lora_algos.adapter import Adapter, OwnAdapter
from lora_algos.config import LayerSpec
from lora_algos.kernels import WIDE, Kernel, Saved, Tensors
from lora_algos.layer_op import LayerOp, channel_sum
from lora_algos.lora import ADAPTER_NAME, INITS_OF_LINEAR, LoRABase, OwnLoRA, PeftAdapter
from lora_algos.low_rank import TINY, add_low_rank, low_rank_grads, norms_after, squared_norms
from lora_algos.tensors import Shapes

MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class MagnitudeAndDirection(Kernel):
    """Factors (up, down, magnitude, squared norms of the base's channels)."""

    num_constants = 1

    def _norms(self, weight: Tensor, factors: Tensors) -> Tensor:
        """||V|| per output channel, without forming V."""
        up, down, _, base = factors
        return norms_after(weight, up.detach(), down.detach(), self.scaling, base)

    def delta(self, weight: Tensor, factors: Tensors) -> Tensor:
        up, down, magnitude, _ = factors
        ratio = (magnitude.flatten() / self._norms(weight, factors)).view(
            -1, *[1] * (len(self.shape) - 1)
        )
        w = weight.to(up.dtype)
        moved = w + (up.flatten(1) @ (down.flatten(1) * self.scaling)).view(self.shape)
        return ratio * moved - w

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensors
    ) -> tuple[Tensor, Tensors]:
        up, down, magnitude = factors[:3]
        norms = self._norms(weight, factors)
        ratio = magnitude.flatten() / norms
        y = self.op(x, weight, bias)
        h = add_low_rank(self.op, y, x, up.to(x.dtype), down.to(x.dtype), self.scaling)
        scale = self.op.channel_view(ratio)
        if bias is None:
            y.mul_(scale)
        else:  # the bias, which is in y, is not scaled
            shift = self.op.channel_view((1 - ratio) * bias.to(ratio.dtype))
            # in the magnitude's dtype, so that y is rounded once more only; in place where they are
            # the same
            y = (
                y.mul_(scale).add_(shift)
                if y.dtype == shift.dtype
                else torch.addcmul(shift, y, scale).to(y.dtype)
            )
        return y, (x, h, y, norms)

    def backward(
        self, grad: Tensor, saved: Saved, input_grad: bool
    ) -> tuple[Tensor | None, Tensors]:
        up, down, magnitude, _ = saved.factors
        h, y, norms = saved.kept
        op, m = self.op, magnitude.flatten()
        weighted = grad * y
        products = channel_sum(op, weighted, m.dtype)
        if saved.bias is not None:
            products -= channel_sum(op, grad, m.dtype) * saved.bias.to(m.dtype)
        d_magnitude = torch.where(m.abs() > TINY, products / m, 0).view(magnitude.shape)
        through = torch.mul(grad, op.channel_view(m / norms), out=weighted)
        dx = op.input_grad(through, saved.weight, saved.shape) if input_grad else None
        low_rank = (up.to(grad.dtype), down.to(grad.dtype), self.scaling)
        return dx, (*low_rank_grads(op, through, saved.x, low_rank, dx, h), d_magnitude)


class DoRABase(LoRABase):
    """What DoRA is, whoever holds its parameters."""

    algorithm = "DoRA"
    detected_by: ClassVar[tuple[str, ...]] = (MAGNITUDE,)
    squared_norms: Tensor

    @classmethod
    def shapes(cls, spec: LayerSpec, weight: torch.Size) -> Shapes:
        if spec.options.init in INITS_OF_LINEAR:
            raise AdapterError(
                f"DoRA starts from default or gaussian factors, not from {spec.options.init}"
            )
        return {**super().shapes(spec, weight), MAGNITUDE: (weight[0],)}

    @classmethod
    def make_kernel(
        cls, op: LayerOp, spec: LayerSpec, weight: torch.Size, names: Iterable[str]
    ) -> Kernel:
        return MagnitudeAndDirection(op, weight, spec.scaling)

    @classmethod
    def peft_layers(cls) -> dict[type[nn.Module], Callable[..., Adapter]]:
        return {
            nn.Linear: DoRALinear,
            nn.Conv1d: DoRAConv1d,
            nn.Conv2d: DoRAConv2d,
            nn.Conv3d: DoRAConv3d,
        }

    @classmethod
    def own_layer(cls) -> Callable[..., Adapter]:
        return OwnDoRA

    def setup(self, base_layer: Any, spec: LayerSpec) -> None:
        super().setup(base_layer, spec)
        (squared,) = self.from_weight(base_layer.weight.detach())
        self.register_buffer("squared_norms", squared, persistent=False)  # type: ignore[attr-defined]
        self.register_load_state_dict_post_hook(measure_again)  # type: ignore[attr-defined]
        with torch.no_grad():
            # the norm by the kernel's own formula: the ratio is 1 to the last digit
            magnitude = self.tensors()[MAGNITUDE]
            magnitude.copy_(squared.clamp_min(TINY).sqrt().view(magnitude.shape))

    @classmethod
    def from_weight(cls, weight: Tensor) -> Tensors:
        dtype = weight.dtype if weight.dtype in WIDE else torch.float32
        return (squared_norms(weight, dtype),)

    def factors(self, tensors: dict[str, Tensor]) -> Tensors:
        return *super().factors(tensors), self.squared_norms

    def without_update(self, masked: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        magnitude = masked[MAGNITUDE]
        start = self.squared_norms.clamp_min(TINY).sqrt().view(magnitude.shape)
        return {**masked, MAGNITUDE: torch.where(keep, magnitude, start)}


class MagnitudeToCome(peft_lora.LoraVariant):
    """DoRA to PEFT, but that the values are left to `setup`: PEFT's take tensors of the size of the
    weight."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        weight = module.get_base_layer().weight
        sides = (
            (1, weight.shape[0], *[1] * (weight.ndim - 2))
            if weight.ndim > 2
            else (weight.shape[0],)
        )
        holder = DoraLinearLayer(fan_in_fan_out=False)
        holder.weight = nn.Parameter(torch.empty(sides, device=weight.device))
        module.lora_magnitude_vector[adapter_name] = holder


def measure_again(layer: DoRABase, _: Any) -> None:
    """WHEN: the layer has loaded a state dict, in which the base may be another than the one it was
    attached to."""
    (squared,) = layer.from_weight(layer.base_layer.weight.detach())
    whole = getattr(squared, "full_tensor", None)  # of a weight that FSDP has in parts
    layer.squared_norms = whole() if whole else squared


class PeftDoRA(DoRABase, PeftAdapter):
    """A layer of PEFT's with our forward pass."""

    has_magnitude = True

    def resolve_lora_variant(self, **kwargs: Any) -> peft_lora.LoraVariant:
        return MagnitudeToCome()

    def tensors(self) -> dict[str, nn.Parameter]:
        magnitude = self.lora_magnitude_vector[ADAPTER_NAME].weight
        return {**super().tensors(), MAGNITUDE: magnitude}  # type: ignore[dict-item]

    def in_file(self) -> tuple[dict[str, Tensor], float]:
        tensors, alpha = super().in_file()
        return {**tensors, MAGNITUDE: tensors[MAGNITUDE].flatten()}, alpha


class DoRALinear(PeftDoRA, peft_lora.Linear):
    """A Linear layer with a DoRA."""


class DoRAConv1d(PeftDoRA, peft_lora.Conv1d):
    """A Conv1d layer with a DoRA."""


class DoRAConv2d(PeftDoRA, peft_lora.Conv2d):
    """A Conv2d layer with a DoRA."""


class DoRAConv3d(PeftDoRA, peft_lora.Conv3d):
    """A Conv3d layer with a DoRA."""


class OwnDoRA(DoRABase, OwnAdapter):
    """A grouped convolution with a DoRA."""

    @classmethod
    def initialize(cls, tensors: dict[str, Tensor]) -> None:
        OwnLoRA.initialize(tensors)


ADAPTER = DoRABase
