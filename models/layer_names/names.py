"""Names of layers in files: the interface.

diffusers' names are used everywhere in this project. The original model's code may name a layer
differently, and may hold several layers as one fused weight. ComfyUI has the original names.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


class RowSlice(NamedTuple):
    """Rows of a fused weight."""

    first: int
    num_rows: int


@dataclass(frozen=True)
class OriginalLayer:
    """A layer in the original model: a weight, or a part of a fused weight."""

    name: str
    """Without `diffusion_model.` in front and `.weight` at the end."""
    row_slice: RowSlice | None = None
    """The layer's rows of a fused weight; None if the weight is the layer's alone."""
    swapped_halves: bool = False
    """True if the two halves of the rows, scale and shift, have the opposite order there."""
    known_by_diffusers_name: bool = True
    """True if ComfyUI also loads adapters under diffusers' name, with `diffusers_prefix`."""


@dataclass(frozen=True, kw_only=True)
class LayerNames(ABC):
    """Names of a family's layers in adapter files and in single-file models."""

    file_formats: tuple[str, ...]
    """Formats of adapter files (adapter_files/writers.py). A run writes the first one that holds
    its adapter for every program. The last one holds every adapter."""
    kohya_uses_original_names: bool = True
    """True if kohya's names are made from the original model's names of layers, not diffusers'."""
    diffusers_prefix: str = ""
    """ComfyUI's prefix of diffusers' names, by which alone it knows the parts of a fused weight.
    Empty if it does not know them."""
    writes_alpha: bool = True
    """True if LoRAs under ComfyUI's names have alpha tensors. Otherwise alpha is multiplied into
    the second factor."""
    comfyui_loads_norms: bool = True
    """False if ComfyUI loads no adapters of normalization layers."""

    @abstractmethod
    def original(self, denoiser: nn.Module) -> dict[str, OriginalLayer]:
        """Return where each layer with a weight is in the original model, by diffusers' name.

        The denoiser may be on the meta device."""

    @abstractmethod
    def file_keys(self, denoiser: nn.Module, keys: Collection[str]) -> dict[str, str]:
        """Return the key of each parameter in a single file that has the given keys.

        A fused weight is the key of several parameters; `original` names the rows of each."""

    def text_encoders(self, denoiser: nn.Module) -> dict[str, str]:
        """Return kohya's names of the layers of text encoders that are part of the denoiser."""
        return text_encoder_names(denoiser)


def swap_halves(tensor: Tensor) -> Tensor:
    """Return a tensor with the halves of its rows swapped."""
    return tensor.roll(tensor.shape[0] // 2, 0)


def layers_with_weight(module: nn.Module) -> dict[str, Any]:
    """Return all modules in `module` whose weight is a parameter, by name."""
    layers = {}
    for name, layer in module.named_modules():
        if isinstance(getattr(layer, "weight", None), nn.Parameter):
            layers[name] = layer
    return layers


def text_encoder_names(denoiser: nn.Module) -> dict[str, str]:
    """Return kohya's names of the text encoders' layers, by their names in the denoiser.

    A denoiser has text encoders as children if they are trained with it. One encoder is `lora_te`,
    several are `lora_te1`, `lora_te2`."""
    encoders = {
        name: child for name, child in denoiser.named_children() if name.startswith("text_encoder")
    }
    names = {}
    for number, (encoder_name, encoder) in enumerate(encoders.items(), 1):
        prefix = "lora_te" if len(encoders) == 1 else f"lora_te{number}"
        for layer in layers_with_weight(encoder):
            # some versions of transformers have `text_model` in front of most names
            kohya_name = layer.removeprefix("text_model.")
            if kohya_name != "text_projection":
                kohya_name = f"text_model.{kohya_name}"
            names[f"{encoder_name}.{layer}"] = f"{prefix}_{kohya_name.replace('.', '_')}"
    return names
