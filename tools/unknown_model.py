"""In the place of a base model that was not given: the layers that a file itself names, their
shapes read from it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapter_files.keys import split_key
from adapter_files.layer_names import LayerNames
from adapter_files.safetensors_stream import TensorInfo
from lora_algos.detection import guess_weight_shape
from tools.base_model import bare, nested

PREFIXES = ("base_model.model.", "unet.", "transformer.", "diffusion_model.")
# what all layers of a file begin with, each with one of these -> the format of the file
STARTS = {
    "kohya": ("lora_", "lycoris_"),
    "comfyui": ("diffusion_model.", "text_encoders."),
    "diffusers": ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3."),
}


def format_of(spellings: Iterable[str]) -> str | None:
    """The format whose names all these layers, or their keys, have; None if no one has them all."""
    given = [*spellings]
    return next(
        (
            name
            for name, starts in STARTS.items()
            if given and all(s.startswith(starts) for s in given)
        ),
        None,
    )


@dataclass(frozen=True)
class Verbatim(LayerNames):
    """Layers are called what the file calls them, without the prefix that PEFT and diffusers put
    before all."""

    prefix: str = ""

    def kohya(self, layer: str) -> str:
        return self.prefix + layer

    comfyui = diffusers = peft = kohya

    def spellings(self, layer: str) -> list[str]:
        return [self.prefix + layer]


@dataclass
class UnknownModel:
    """Stands for a base model of which only the adapter file is known. Its weights have no values."""

    names: Verbatim = field(default_factory=Verbatim)
    layers: dict[str, torch.Size] = field(default_factory=dict)
    file_format: str = "kohya"

    def take_spellings(self, infos: Mapping[str, TensorInfo], folder: bool) -> None:
        """Takes over the layers that the keys of a file name, or of a folder of PEFT's."""
        found: dict[str, dict[str, TensorInfo]] = {}
        for key, info in infos.items():
            spelling, name = split_key(key)
            if name and spelling not in ("", *PREFIXES):
                found.setdefault(spelling, {})[name] = info
        # a file of several parts of a model, a UNet and text encoders, keeps the prefix in each
        # layer's name
        prefix = next(
            (p for p in PREFIXES if found and all(layer.startswith(p) for layer in found)), ""
        )
        self.names = Verbatim(prefix=prefix)
        bare = (
            "diffusers" if prefix else "kohya"
        )  # PEFT's names without its config: as diffusers, which has none
        self.file_format = "peft" if folder else format_of(found) or bare
        self.layers = {
            layer.removeprefix(prefix): shape_of(parts) for layer, parts in found.items()
        }

    def empty(self, layer: str) -> Tensor:
        return self.weight(layer)

    def weight(self, layer: str) -> Tensor:
        return torch.empty(self.layers[layer], device="meta")

    def alone(self, weights: Mapping[str, Tensor]) -> nn.Module:
        return nested({layer: bare(nn.Linear, weight) for layer, weight in weights.items()})


def shape_of(parts: Mapping[str, TensorInfo]) -> torch.Size:
    """The shape of a layer's weight by the tensors of its adapter; a convolution may come out as a
    matrix."""
    shapes = {name: info.shape for name, info in parts.items()}
    return guess_weight_shape(shapes)


def block_of(layer: str) -> str:
    """The block that a layer is counted under: `down_blocks.1.attentions`, `mid_block.resnets`,
    `conv_in`."""
    parts = layer.split(".")
    if len(parts) == 1:
        match = re.match(r".*?(_\d+_[a-z]+|mid_block_[a-z]+)", layer)  # a flat name such as kohya's
        return match[0] if match else layer
    return ".".join(parts[: 3 if parts[1].isdigit() else 2])
