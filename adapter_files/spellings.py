"""Names of a model's layers in adapter files, in the spelling of each program."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from models.base import ModelFamily
from models.layer_names.names import RowSlice

DIFFUSERS_PREFIXES = ("unet", "transformer")
DENOISER_PREFIXES = (*DIFFUSERS_PREFIXES, "diffusion_model", "base_model.model")
KOHYA_PREFIXES = ("lora_unet_", "lycoris_", "lora_transformer_", "lycoris_unet_")


@dataclass(frozen=True)
class LayerSpellings:
    """Names of one model's layers. A layer without further mark is named as in diffusers.

    The original model is the one that ComfyUI loads. It can have several layers as one weight."""

    original: dict[str, str] = field(default_factory=dict)
    """Layer -> its name in the original model, without `diffusion_model.`."""
    component: str = "unet"
    """diffusers' name of the denoiser in a pipeline."""
    kohya_uses_original: bool = False
    """kohya's names are made of the original names."""
    slices: dict[str, RowSlice] = field(default_factory=dict)
    """Layer -> its rows in the original weight, if that weight is fused of several layers."""
    swapped: frozenset[str] = frozenset()
    """Layers whose halves of rows are swapped in the original weight."""
    comfyui_prefix: str = ""
    """Prefix under which ComfyUI knows the parts of fused weights by their names in diffusers.

    Empty: it does not know them."""
    writes_alpha: bool = True
    """LoRAs under ComfyUI's names have an alpha; else it is in their second factor."""
    original_only: frozenset[str] = frozenset()
    """Layers that ComfyUI does not know by their names in diffusers."""
    text_encoders: dict[str, str] = field(default_factory=dict)
    """Layers of text encoders, which begin with the encoder's name in a pipeline -> their name in
    all programs but diffusers: `lora_te_text_model_encoder_layers_0_mlp_fc1`."""

    def kohya(self, layer: str) -> str:
        """Return `lora_unet_down_blocks_0_attentions_0_proj_in` and the like."""
        if layer in self.text_encoders:
            return self.text_encoders[layer]
        name = self.original[layer] if self.kohya_uses_original else layer
        return f"lora_unet_{flat(name)}"

    def comfyui(self, layer: str) -> str:
        """Return `diffusion_model.<original name>`."""
        if layer in self.text_encoders:
            return self.text_encoders[layer]
        return f"diffusion_model.{self.original[layer]}"

    def diffusers(self, layer: str) -> str:
        """Return `unet.<layer>` and the like."""
        return layer if layer in self.text_encoders else f"{self.component}.{layer}"

    def peft(self, layer: str) -> str:
        """Return `base_model.model.<layer>`."""
        return f"base_model.model.{layer}"

    @cached_property
    def fused_layers(self) -> dict[str, list[str]]:
        """Original name of each fused weight -> its layers, in the order of their rows."""
        layers_by_name: dict[str, list[str]] = {}
        for layer in sorted(self.slices, key=self.slices.__getitem__):
            layers_by_name.setdefault(self.original[layer], []).append(layer)
        return layers_by_name

    def comfyui_knows_slice(self, layer: str) -> bool:
        """Return whether the layer is part of a fused weight, and ComfyUI knows it by its own name."""
        is_known = bool(self.comfyui_prefix) and layer not in self.original_only
        return layer in self.slices and is_known

    def siblings(self, layer: str) -> list[str]:
        """Return all layers that share this layer's fused weight, including itself."""
        if layer not in self.slices:
            return [layer]
        return self.fused_layers[self.original[layer]]

    def num_fused_rows(self, layer: str) -> int:
        """Return the number of rows of the fused weight that contains the layer."""
        first, count = self.slices[self.siblings(layer)[-1]]
        return first + count

    def groups(self, layers: Iterable[str]) -> list[list[str]]:
        """Return `layers`, with those of one fused weight together."""
        groups: dict[str, list[str]] = {}
        for layer in layers:
            groups.setdefault(self.siblings(layer)[0], []).append(layer)
        return list(groups.values())

    def spellings(self, layer: str) -> list[str]:
        """Return all names by which some program calls the layer."""
        if layer in self.text_encoders:
            return self._text_encoder_spellings(layer)
        return [
            layer,
            *(prefix + flat(layer) for prefix in KOHYA_PREFIXES),
            *(f"{prefix}.{layer}" for prefix in DENOISER_PREFIXES),
            *(f"{prefix}.base_model.model.{layer}" for prefix in DIFFUSERS_PREFIXES),
            *self.original_spellings(layer),
        ]

    def _text_encoder_spellings(self, layer: str) -> list[str]:
        """Some versions of transformers put `text_model` before most names."""
        encoder, _, name = layer.partition(".")
        name = name.removeprefix("text_model.")
        return [self.text_encoders[layer], f"{encoder}.{name}", f"{encoder}.text_model.{name}"]

    def original_spellings(self, layer: str) -> list[str]:
        """Return all names of the original weight that is, or contains, the layer."""
        if layer not in self.original:
            return []
        name = self.original[layer]
        return [
            f"diffusion_model.{name}",
            f"model.diffusion_model.{name}",
            f"lora_unet_{flat(name)}",
            f"lycoris_{flat(name)}",
        ]

    def names_other_weight(self, spelling: str, layer: str) -> bool:
        """Return whether a name means an original weight that differs from the layer's weight."""
        differs = layer in self.slices or layer in self.swapped
        return differs and spelling in self.original_spellings(layer)

    def layers_by_spelling(self, layers: Iterable[str]) -> dict[str, list[str]]:
        """Return a table from each name to the layers that it means."""
        table: dict[str, list[str]] = {}
        for layer in layers:
            for spelling in dict.fromkeys(self.spellings(layer)):
                table.setdefault(spelling, []).append(layer)
        return table


def flat(name: str) -> str:
    """Return a name as kohya's programs write it."""
    return name.replace(".", "_")


def layer_spellings(family: ModelFamily, denoiser: nn.Module) -> LayerSpellings:
    """Return the names of a denoiser's layers; its weights may be without values."""
    originals = family.layer_names.original(denoiser)
    names, slices = {}, {}
    for layer, original in originals.items():
        names[layer] = original.name
        if original.row_slice:
            slices[layer] = original.row_slice
    return LayerSpellings(
        original=names,
        # each of two denoisers has a separate file, in which it is the only one
        component=family.denoiser_component.removesuffix("_2"),
        kohya_uses_original=family.layer_names.kohya_uses_original_names,
        slices=slices,
        swapped=frozenset(
            layer for layer, original in originals.items() if original.swapped_halves
        ),
        comfyui_prefix=family.layer_names.diffusers_prefix,
        writes_alpha=family.layer_names.writes_alpha,
        original_only=frozenset(
            layer for layer, original in originals.items() if not original.known_by_diffusers_name
        ),
        text_encoders=family.layer_names.text_encoders(denoiser),
    )
