"""Stand-in for a missing base model: layers and shapes are inferred from the adapter file."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapter_files.keys import split_key
from adapter_files.safetensors_stream import TensorInfo
from adapter_files.spellings import LayerSpellings
from lora_algos.detection import guess_weight_shape
from tools.base_model import module_with_weight, nest_modules

PREFIXES = ("base_model.model.", "unet.", "transformer.", "diffusion_model.")
"""Prefixes that PEFT, diffusers and ComfyUI put before all layer names of a file."""
FORMAT_PREFIXES = {
    "kohya": ("lora_", "lycoris_"),
    "comfyui": ("diffusion_model.", "text_encoders."),
    "diffusers": ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3."),
}
"""Format -> prefixes. Each layer name of a file in this format begins with one of them."""


def format_of(names: Iterable[str]) -> str | None:
    """Return the format to which all these layer names or keys belong; None if no format fits."""
    all_names = tuple(names)
    if not all_names:
        return None
    for file_format, prefixes in FORMAT_PREFIXES.items():
        if all(name.startswith(prefixes) for name in all_names):
            return file_format
    return None


@dataclass(frozen=True)
class VerbatimNames(LayerSpellings):
    """Layer names as they are in the file, without a prefix that all of them have."""

    prefix: str = ""

    def kohya(self, layer: str) -> str:
        return self.prefix + layer

    comfyui = diffusers = peft = kohya

    def spellings(self, layer: str) -> list[str]:
        return [self.prefix + layer]


@dataclass
class UnknownModel:
    """A base model that is known only from an adapter file. Its weights have no values."""

    names: VerbatimNames = field(default_factory=VerbatimNames)
    layers: dict[str, torch.Size] = field(default_factory=dict)
    """Layer -> shape of its weight."""
    file_format: str = "kohya"
    """Format of the adapter file."""

    def learn_layers(self, infos: Mapping[str, TensorInfo], is_folder: bool) -> None:
        """Take the layers from the keys of an adapter file. `is_folder`: of a folder of PEFT."""
        tensors_of_name = group_by_name(infos)
        prefix = shared_prefix(tensors_of_name)
        self.names = VerbatimNames(prefix=prefix)
        # PEFT's names without its folder: diffusers' format does not need PEFT's config
        default_format = "diffusers" if prefix else "kohya"
        self.file_format = format_of(tensors_of_name) or default_format
        if is_folder:
            self.file_format = "peft"
        self.layers = {}
        for name, tensors in tensors_of_name.items():
            layer = name.removeprefix(prefix)
            shapes = {tensor_name: info.shape for tensor_name, info in tensors.items()}
            self.layers[layer] = guess_weight_shape(shapes)

    def empty_weight(self, layer: str) -> Tensor:
        """Return a layer's weight without values."""
        return self.weight(layer)

    def weight(self, layer: str) -> Tensor:
        """Return a layer's weight, which has no values."""
        return torch.empty(self.layers[layer], device="meta")

    def module_with(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """Return a model that has only some layers, and of these only the weights.

        IN: layer -> weight."""
        modules = {}
        for layer, weight in weights.items():
            modules[layer] = module_with_weight(nn.Linear, weight)
        return nest_modules(modules)


def group_by_name(infos: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Return layer name in the file -> name of a tensor in lora_algos -> its dtype and shape."""
    groups: dict[str, dict[str, TensorInfo]] = {}
    for key, info in infos.items():
        layer_name, tensor_name = split_key(key)
        is_layer = layer_name not in ("", *PREFIXES)
        if tensor_name and is_layer:
            group = groups.setdefault(layer_name, {})
            group[tensor_name] = info
    return groups


def shared_prefix(layer_names: Iterable[str]) -> str:
    """Return the prefix that all layer names of a file have.

    Empty if the names have different prefixes, as in a file of a UNet and text encoders. The
    prefixes then remain parts of the layer names."""
    all_names = tuple(layer_names)
    if not all_names:
        return ""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in all_names):
            return prefix
    return ""
