"""DoRA: W' = m V / ||V|| with V = W + (alpha / rank) * up @ down (Liu et al. 2024, arXiv
2402.09353), in PEFT's layers. There is one norm and one magnitude m per output channel. As in PEFT,
no gradient flows through the norm.

Shapes: those of LoRA, and the magnitude (out), `lora_magnitude_vector` in PEFT. m starts at ||W||,
so at first W' = W.

On activations: y = k (V x) + b with k = m / ||V||. ||V||^2 is computed from products of thin
matrices, because ||W||^2 is known. The backward pass needs the input and the output; the output
gives the gradient of m.

Other programs write the magnitude as `dora_scale` (out, 1...). ComfyUI and Forge divide by ||W||
where DoRA divides by ||V||. So a file that is written for them has the magnitude divided by ||V|| /
||W||. Its metadata says so, and reading it multiplies by the quotient again.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import AdapterError
from lora_algos.config import LayerSpec
from lora_algos.kernels import (
    WIDE_DTYPES,
    Factors,
    Gradients,
    Kernel,
    Prepared,
    SavedTensors,
    multiples,
)
from lora_algos.layer_op import LayerOp, channel_sums
from lora_algos.lora import LINEAR_INITS, PEFT_NAMES, LoRA, import_tensors, weight_shape
from lora_algos.low_rank import (
    DOWN,
    MIN_NORM,
    UP,
    LowRankUpdate,
    add_low_rank,
    low_rank_grads,
    low_rank_terms,
    merged_norms,
    squared_norms,
)
from lora_algos.peft_layers import DORA_LAYERS, MAGNITUDE, peft_layer_class
from lora_algos.tensors import LayerTensors, Shapes
from lora_algos.traits import (
    FileTraits,
    Layers,
    Metadata,
    PeftTraits,
    TensorTraits,
    Weights,
    first_axes,
)

DORA_SCALE = "dora_scale"
NORMS = "squared_norms"
"""||W||^2 per output channel."""
DIVISOR_KEY, BASE_NORM = "train_lora.dora_scale", "norm of the base weight"
"""Metadata that states the norm that `dora_scale` is meant to be divided by."""


@dataclass(frozen=True)
class MagnitudeAndDirection(Kernel):
    """Factors (up, down, magnitude, squared norms of the base's channels)."""

    num_constants = 1

    def merged_norms(self, weight: Tensor, factors: Factors) -> Tensor:
        """Return ||V|| per output channel.

        V is not formed, and no gradient flows."""
        up, down, _, weight_norms = factors
        return merged_norms(weight, up.detach(), down.detach() * self.scaling, weight_norms)

    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        """Return W' - W for a weight (out, in, *kernel)."""
        up, down, magnitude, _ = factors
        wide_weight = weight.to(up.dtype)
        update = up.flatten(1) @ (down.flatten(1) * self.scaling)
        direction = wide_weight + update.view(self.shape)
        norms = self.merged_norms(weight, factors)
        ratio = magnitude.flatten() / norms
        ratio = ratio.view(-1, *[1] * (len(self.shape) - 1))
        return ratio * direction - wide_weight

    def prepare(self, weight: Tensor, factors: Factors, dtype: torch.dtype) -> Prepared:
        """Return the low-rank update, and per output channel: k, k - 1 and 1 / m.

        A channel with m = 0 has no direction, so the last one is 0 there."""
        _, _, magnitude, _ = factors
        m = magnitude.flatten()
        ratio = m / self.merged_norms(weight, factors)
        inverse_m = torch.where(m.abs() > MIN_NORM, 1 / m, 0)
        update = multiples(factors, low_rank_terms(self.scaling), dtype)
        return *update, ratio, 1 - ratio, inverse_m

    def factors_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        prepared: Prepared,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        *update, ratio, bias_ratio, _ = prepared
        y = self.op(x, weight, bias)
        h = add_low_rank(self.op, y, x, LowRankUpdate(*update))
        scale = self.op.channel_view(ratio)
        if bias is None:
            y.mul_(scale)
            return y, (x, h, y)
        # y contains the bias, which must not be scaled
        shift = self.op.channel_view(bias_ratio * bias)
        if y.dtype == shift.dtype:
            y = y.mul_(scale).add_(shift)
        else:  # computed in the magnitude's dtype, so that y is rounded only once more
            y = torch.addcmul(shift, y, scale).to(y.dtype)
        return y, (x, h, y)

    def factors_backward(
        self,
        grad: Tensor,
        saved: SavedTensors,
        needs_input_grad: bool,
    ) -> tuple[Tensor | None, Gradients]:
        *update, ratio, _, inverse_m = saved.prepared
        h, y = saved.extras
        op = self.op
        weighted_grad = grad * y
        products = channel_sums(op, weighted_grad, ratio.dtype)
        if saved.bias is not None:
            bias_products = channel_sums(op, grad, ratio.dtype) * saved.bias
            products -= bias_products
        magnitude_grad = products.mul_(inverse_m)
        direction_grad = torch.mul(grad, op.channel_view(ratio), out=weighted_grad)
        input_grad = None
        if needs_input_grad:
            input_grad = op.input_grad(direction_grad, saved.weight, saved.input_shape)
        grads = low_rank_grads(
            op, direction_grad, saved.activation, LowRankUpdate(*update), input_grad, h
        )
        return input_grad, (*grads, magnitude_grad.view(saved.factors[2].shape))


def norm_quotient(tensors: LayerTensors, weight: Tensor) -> Tensor:
    """Return ||V|| / ||W|| per output channel, on the device of the tensors.

    It is computed on the device of the weight."""
    device = weight.device
    up, down = tensors[UP].to(device), tensors[DOWN].to(device)
    scaling = LoRA.traits.scaling(tensors)
    squared = squared_norms(weight, up.dtype)
    norms = merged_norms(weight, up, down * scaling, squared)
    quotient = norms / squared.clamp_min(MIN_NORM).sqrt()
    return quotient.to(tensors[UP].device)


def import_for_weight(tensors: LayerTensors, weight: Tensor, metadata: Metadata) -> LayerTensors:
    """Return the tensors with the magnitude (out). Raises AdapterError if it has another form.

    A weight without values leaves `dora_scale` as the file has it."""
    tensors = dict(tensors)
    if MAGNITUDE in tensors:
        tensors[MAGNITUDE] = tensors[MAGNITUDE].flatten()
    if DORA_SCALE not in tensors:
        return tensors
    num_channels = weight.shape[0]
    scale = tensors.pop(DORA_SCALE)
    has_other_axis = scale.ndim > 1 and scale.shape[0] != num_channels
    if scale.numel() != num_channels or has_other_axis:
        raise AdapterError(
            f"{DORA_SCALE} is {tuple(scale.shape)}: a DoRA with one magnitude per input channel; "
            f"this trainer and PEFT have one per output channel ({num_channels})"
        )
    magnitude = scale.flatten()
    if metadata.get(DIVISOR_KEY) == BASE_NORM and not weight.is_meta:
        magnitude = magnitude * norm_quotient(tensors, weight)
    tensors[MAGNITUDE] = magnitude
    return tensors


def export_for_weight(
    tensors: LayerTensors,
    weight: Tensor,
) -> tuple[LayerTensors, dict[str, str]]:
    """Return the tensors with a `dora_scale` for programs that divide by ||W||.

    Also returns metadata that states the divisor."""
    exported_tensors = dict(tensors)
    magnitude = exported_tensors.pop(MAGNITUDE)
    scale = magnitude / norm_quotient(tensors, weight)
    pointwise = [1] * (weight.ndim - 1)
    exported_tensors[DORA_SCALE] = scale.view(-1, *pointwise)
    return exported_tensors, {DIVISOR_KEY: BASE_NORM}


def peft_options(layers: Layers, weights: Weights) -> dict[str, Any]:
    """Return PEFT's options of a DoRA."""
    return {"use_dora": True, "use_rslora": False}


class DoRA(LoRA):
    """A magnitude per output channel and a direction that a LoRA changes."""

    name = "DoRA"
    traits = TensorTraits(
        names=(UP, DOWN, MAGNITUDE),
        detected_by=(MAGNITUDE, DORA_SCALE),
        groups=((UP, DOWN),),
        needs={MAGNITUDE: DOWN, DORA_SCALE: DOWN},
        vectors=(MAGNITUDE, DORA_SCALE),
        rank_axes={DOWN: 0},
        dropout_axes={DOWN: 0},
        starts_at_zero=(UP,),
        needs_base_weight=True,
        fp32_tensors=(MAGNITUDE, DORA_SCALE),
        row_axes=first_axes(UP, MAGNITUDE, DORA_SCALE),
        zero_rows_change_nothing=False,
        factor_pairs=((UP, DOWN),),
        weight_shape=weight_shape,
        has_exact_weight_shape=True,
        files=FileTraits(
            foreign_names=(DORA_SCALE,),
            alternatives={DORA_SCALE: MAGNITUDE},
            import_tensors=import_tensors,
            import_for_weight=import_for_weight,
            export_for_weight=export_for_weight,
            metadata_keys=(DIVISOR_KEY,),
            shared_alpha_tensor=UP,
            is_in_diffusers_format=True,
            kohya_module="networks.lora",
            peft=PeftTraits(
                "LORA", "lora_alpha", PEFT_NAMES, peft_options, channel_vector=MAGNITUDE
            ),
        ),
    )

    def shapes(self, spec: LayerSpec, weight: torch.Size) -> Shapes:
        init = spec.options.init
        if init in LINEAR_INITS:
            raise AdapterError(
                f"--adapter.init {init}: not supported by DoRA; expected default or gaussian"
            )
        shapes = super().shapes(spec, weight)
        shapes[MAGNITUDE] = (weight[0],)
        return shapes

    def make_kernel(
        self,
        op: LayerOp,
        spec: LayerSpec,
        weight: torch.Size,
        names: Iterable[str],
    ) -> Kernel:
        return MagnitudeAndDirection(op, weight, spec.scaling)

    def weight_constants(self, weight: Tensor) -> LayerTensors:
        dtype = weight.dtype if weight.dtype in WIDE_DTYPES else torch.float32
        return {NORMS: squared_norms(weight, dtype)}

    def initialize_from_constants(self, tensors: LayerTensors, constants: LayerTensors) -> None:
        """Set the magnitude to ||W|| by the kernel's own formula: the ratio is exactly 1."""
        tensors[MAGNITUDE].copy_(first_magnitude(tensors, constants))

    def factors(self, tensors: LayerTensors, spec: LayerSpec) -> Factors:
        return tensors[UP], tensors[DOWN], tensors[MAGNITUDE], tensors[NORMS]

    def without_update(
        self,
        tensors: LayerTensors,
        constants: LayerTensors,
        is_kept: Tensor,
    ) -> LayerTensors:
        magnitude = tensors[MAGNITUDE]
        start = first_magnitude(tensors, constants)
        return {**tensors, MAGNITUDE: torch.where(is_kept, magnitude, start)}

    def layer_class(self, base_layer: nn.Module) -> Callable[..., nn.Module] | None:
        return peft_layer_class(DORA_LAYERS, base_layer)


def first_magnitude(tensors: LayerTensors, constants: LayerTensors) -> Tensor:
    """Return ||W||, shaped like the magnitude."""
    norms = constants[NORMS].clamp_min(MIN_NORM).sqrt()
    return norms.view(tensors[MAGNITUDE].shape)


ALGORITHM = DoRA()
