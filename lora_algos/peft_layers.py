"""PEFT's layers of LoRA and DoRA: their parameters and initializations, with our forward pass."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_lora
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from common.errors import AdapterError
from lora_algos.adapter import AdapterLayer
from lora_algos.algorithm import Algorithm
from lora_algos.config import LayerSpec
from lora_algos.frozen_weight import stored_weight, write_frozen_weight
from lora_algos.low_rank import DOWN, UP, product_difference
from lora_algos.tensors import ALPHA, LayerTensors, Shapes

ADAPTER_NAME = "default"
"""PEFT's name of the one adapter in each layer."""
LINEAR_INITS = ("orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16")
"""Initializations that take a product out of the base weight; PEFT has them for Linear layers."""
MAGNITUDE = "lora_magnitude_vector"
"""Name of a DoRA's magnitude in a file, and of its module in PEFT."""


class PeftLayer(AdapterLayer):
    """A LoRA layer of PEFT with our forward pass."""

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_magnitude_vector: nn.ModuleDict
    initial_up: Tensor | None
    """First values of `lora_up` if the initialization took a product out of the base."""
    initial_down: Tensor | None
    has_magnitude: ClassVar[bool] = False

    def __init__(
        self,
        base_layer: Any,
        algorithm: Algorithm,
        spec: LayerSpec,
        shapes: Shapes | None = None,
    ):
        """`shapes` follow from the rank in `spec`."""
        init = spec.options.init
        if not isinstance(base_layer, nn.Linear) and init in LINEAR_INITS:
            init = "default"
        changes_base = init in LINEAR_INITS
        weight = stored_weight(base_layer)
        if changes_base and weight.dtype.itemsize == 1:
            raise AdapterError(
                f"--adapter.init {init}: the base has dtype {weight.dtype}; expected fp32, bf16 "
                "or fp16"
            )
        original_weight = weight.detach().clone() if changes_base else None
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,  # type: ignore[arg-type]  # annotated int, but only divided by r
            use_rslora=spec.options.rslora,
            init_lora_weights=True if init == "default" else init,  # type: ignore[arg-type]
            use_dora=self.has_magnitude,
        )
        # PEFT moves some of its tensors to the meta device too late
        with torch.device("meta") if weight.is_meta else nullcontext():
            arguments = {"config": config, "r": spec.rank, "lora_alpha": spec.alpha}
            super().__init__(base_layer, ADAPTER_NAME, **arguments)  # type: ignore[call-arg]
        for module in (self.lora_A, self.lora_B, self.lora_magnitude_vector):
            # PEFT uses the base's dtype; bf16 would round two thirds of the updates away
            module.float()
        initial_up = initial_down = None
        if original_weight is not None:
            write_frozen_weight(base_layer, original_weight)
            tensors = self.update_tensors()
            initial_up = tensors[UP].detach().clone()
            initial_down = tensors[DOWN].detach().clone()
        self.register_buffer("initial_up", initial_up)  # type: ignore[attr-defined]
        self.register_buffer("initial_down", initial_down)  # type: ignore[attr-defined]
        self.setup(base_layer, algorithm, spec)

    def update_tensors(self) -> dict[str, nn.Parameter]:
        return {
            UP: self.lora_B[ADAPTER_NAME].weight,  # type: ignore[dict-item]
            DOWN: self.lora_A[ADAPTER_NAME].weight,  # type: ignore[dict-item]
        }

    def constants(self) -> LayerTensors:
        if self.initial_up is None or self.initial_down is None:
            return {}
        return {"initial_up": self.initial_up, "initial_down": self.initial_down}

    def file_tensors(self) -> LayerTensors:
        """Return the tensors less the product that was taken out of the base."""
        tensors = super().file_tensors()
        if self.initial_up is not None and self.initial_down is not None:
            tensors[UP], tensors[DOWN] = product_difference(
                tensors[UP], tensors[DOWN], self.initial_up, self.initial_down
            )
            tensors[ALPHA] = tensors[ALPHA] * (len(tensors[DOWN]) / self.spec.rank)
        return tensors

    def raise_unsupported(self, *args: Any, **kwargs: Any) -> None:
        """Raise AdapterError. WHEN: a switch of PEFT is used that our forward pass ignores."""
        raise AdapterError(
            "layers of this trainer do not follow PEFT's switches (enable_adapters, scale_layer "
            "and the like). Export with --export.formats peft and load that with PEFT, or use "
            "merge and unmerge of lora_algos.adapted_model.AdaptedModel"
        )

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge the update. Arguments, which PEFT uses to merge adapters by name, are errors."""
        if args or kwargs:
            self.raise_unsupported()
        super().merge()

    enable_adapters = set_scale = scale_layer = unscale_layer = delete_adapter = raise_unsupported


class LoRALinear(PeftLayer, peft_lora.Linear):
    """A Linear layer with a LoRA."""


class LoRAConv1d(PeftLayer, peft_lora.Conv1d):
    """A Conv1d layer with a LoRA."""


class LoRAConv2d(PeftLayer, peft_lora.Conv2d):
    """A Conv2d layer with a LoRA."""


class LoRAConv3d(PeftLayer, peft_lora.Conv3d):
    """A Conv3d layer with a LoRA."""


class EmptyMagnitude(peft_lora.LoraVariant):
    """PEFT's DoRA without the magnitude's values, for which PEFT forms tensors as large as the
    weight."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Register an empty magnitude; `AdapterLayer.setup` fills it."""
        weight = stored_weight(module.get_base_layer())
        shape: tuple[int, ...] = (weight.shape[0],)
        if weight.ndim > 2:
            shape = (1, weight.shape[0], *[1] * (weight.ndim - 2))
        magnitude_layer = DoraLinearLayer(fan_in_fan_out=False)
        magnitude_layer.weight = nn.Parameter(torch.empty(shape, device=weight.device))
        module.lora_magnitude_vector[adapter_name] = magnitude_layer


class PeftDoRALayer(PeftLayer):
    """A DoRA layer of PEFT with our forward pass."""

    has_magnitude = True

    def resolve_lora_variant(self, **kwargs: Any) -> peft_lora.LoraVariant:
        return EmptyMagnitude()

    def update_tensors(self) -> dict[str, nn.Parameter]:
        tensors = super().update_tensors()
        tensors[MAGNITUDE] = self.lora_magnitude_vector[ADAPTER_NAME].weight  # type: ignore[assignment]
        return tensors

    def file_tensors(self) -> LayerTensors:
        tensors = super().file_tensors()
        tensors[MAGNITUDE] = tensors[MAGNITUDE].flatten()
        return tensors


class DoRALinear(PeftDoRALayer, peft_lora.Linear):
    """A Linear layer with a DoRA."""


class DoRAConv1d(PeftDoRALayer, peft_lora.Conv1d):
    """A Conv1d layer with a DoRA."""


class DoRAConv2d(PeftDoRALayer, peft_lora.Conv2d):
    """A Conv2d layer with a DoRA."""


class DoRAConv3d(PeftDoRALayer, peft_lora.Conv3d):
    """A Conv3d layer with a DoRA."""


LayerClasses = dict[type[nn.Module], Callable[..., nn.Module]]
LORA_LAYERS: LayerClasses = {
    nn.Linear: LoRALinear,
    nn.Conv1d: LoRAConv1d,
    nn.Conv2d: LoRAConv2d,
    nn.Conv3d: LoRAConv3d,
}
DORA_LAYERS: LayerClasses = {
    nn.Linear: DoRALinear,
    nn.Conv1d: DoRAConv1d,
    nn.Conv2d: DoRAConv2d,
    nn.Conv3d: DoRAConv3d,
}


def peft_layer_class(
    classes: LayerClasses, base_layer: nn.Module
) -> Callable[..., nn.Module] | None:
    """Return the class for a layer; None for grouped convolutions, where PEFT computes another
    function."""
    if getattr(base_layer, "groups", 1) > 1:
        return None
    for layer_type, layer_class in classes.items():
        if isinstance(base_layer, layer_type):
            return layer_class
    return None
