"""LoRA: dW = (alpha / rank) * up @ down, through PEFT's modules (Hu et al. 2021, arXiv 2106.09685).

Shapes, for a weight (out, in, *kernel): lora_down (rank, in, *kernel), lora_up (out, rank, 1...). up starts at zero.
"""

import re
from collections.abc import Iterator
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_algos.base import Algorithm, LayerSpec, listed
from lora_algos.config import AdapterError

ADAPTER = "default"  # PEFT's name of the one adapter we attach

# of a convolution, PEFT gives lora_A the kernel, stride and padding only
LEFT_OUT = {"dilation", "padding_mode", "_reversed_padding_repeated_twice"}


class LoRA(Algorithm):
    name = "LoRA"

    def attach(self, model: nn.Module, specs: dict[str, LayerSpec]) -> None:
        grouped = [name for name in specs if getattr(model.get_submodule(name), "groups", 1) > 1]
        if grouped:
            faults = [f"{name}: a convolution in groups, to which LoRA cannot be attached" for name in grouped]
            raise AdapterError(listed("--adapter.targets", faults))
        first = next(iter(specs.values()))
        config = LoraConfig(
            r=first.rank,
            lora_alpha=first.alpha,  # type: ignore[arg-type]  # PEFT says int and only divides by the rank
            target_modules="|".join(re.escape(name) for name in specs),  # fullmatch: these layers and no others
            rank_pattern={anchored(name): spec.rank for name, spec in specs.items() if spec.rank != first.rank},
            alpha_pattern={anchored(name): spec.alpha for name, spec in specs.items() if spec.alpha != first.alpha},
        )
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        for _, layer in self.layers(model):
            down, base = layer.lora_A[ADAPTER], layer.base_layer
            for attribute in LEFT_OUT & vars(base).keys():
                setattr(down, attribute, getattr(base, attribute))
            for parameter in self.parameters(layer).values():
                # PEFT takes over the base's dtype; in bf16 two thirds of the updates would be rounded away
                parameter.data = parameter.data.float()

    def layers(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                yield name, module

    def parameters(self, layer: Any) -> dict[str, nn.Parameter]:
        return {
            "lora_down.weight": layer.lora_A[ADAPTER].weight,
            "lora_up.weight": layer.lora_B[ADAPTER].weight,
        }

    def spec(self, layer: Any) -> LayerSpec:
        return LayerSpec(rank=layer.r[ADAPTER], alpha=float(layer.lora_alpha[ADAPTER]))

    def spec_of_file(self, tensors: dict[str, Tensor], weight: Tensor) -> LayerSpec:
        missing = {"lora_down.weight", "lora_up.weight"} - tensors.keys()
        if missing:
            raise AdapterError(f"{', '.join(sorted(missing))} is missing, so this is no LoRA layer")
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        rank = down.shape[0] if down.ndim else 0
        # ComfyUI's node writes convolutions flattened to 2-D, so behind the first dimension only elements are counted
        fits = down.numel() == rank * weight[0].numel() and up.numel() == rank * weight.shape[0]
        if not rank or not fits or up.shape[:1] != weight.shape[:1]:
            shapes = f"lora_down {tuple(down.shape)} and lora_up {tuple(up.shape)}"
            raise AdapterError(f"{shapes} do not fit a weight of {tuple(weight.shape)}")
        alpha = tensors.get("alpha")
        return LayerSpec(rank=rank, alpha=float(alpha) if alpha is not None else float(rank))

    def delta_weight(self, layer: Any) -> Tensor:
        down, up = self.parameters(layer).values()
        spec = self.spec(layer)
        delta = up.flatten(1).float() @ down.flatten(1).float() * (spec.alpha / spec.rank)
        return delta.reshape(layer.base_layer.weight.shape)


def anchored(name: str) -> str:
    """A PEFT pattern that matches the layer `name` alone, not others that end like it."""
    return "^" + re.escape(name)


ALGORITHM = LoRA()
