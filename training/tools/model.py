"""A base model as the sub-commands see it: its layers without weights, and each weight when it is asked for."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lora_algos.attach import adaptable_layers, listed, norm_layers
from models import get_family
from models.config import ModelConfig, ModelError
from training.names import file_names
from training.stream import TensorInfo, TensorStore


class Model:
    """The denoiser of a model on disk. Raises ModelError if it is not one of its family, or not whole."""

    def __init__(self, config: ModelConfig):
        self.family = get_family(config)
        self.skeleton = self.family.empty_denoiser()
        self.files = [file for file in self.family.component_files("denoiser") if file.suffix == ".safetensors"]
        self.store = open_model_files(self.files, str(config.path))
        self.keys = self.family.stored_names(self.skeleton)
        self.layers: dict[str, nn.Module] = {**adaptable_layers(self.skeleton), **norm_layers(self.skeleton)}
        self.names = file_names(self.family, self.skeleton)
        self.layer_of_key = {
            self.keys[f"{layer}.{kind}"]: (layer, kind)
            for layer in self.layers
            for kind in ("weight", "bias")
            if f"{layer}.{kind}" in self.keys
        }
        self._check(str(config.path))

    def _check(self, path: str) -> None:
        faults = []
        for name, parameter in self.skeleton.named_parameters():
            info = self.store.infos.get(self.keys[name])
            if info is None:
                faults.append(f"{self.keys[name]}: missing")
            elif torch.Size(info.shape).numel() != parameter.numel():
                faults.append(f"{self.keys[name]}: {info.shape} in the file, {tuple(parameter.shape)} by its config")
            elif not info.dtype.is_floating_point:
                faults.append(f"{self.keys[name]}: quantised weights ({info.dtype}) are not read")
        if faults:
            raise ModelError(listed(f"{path} is not whole", faults))

    def take_spellings(self, infos: Mapping[str, TensorInfo], folder: bool) -> None:
        """A model that is known needs no names from a file."""

    def has(self, layer: str, kind: str) -> bool:
        return f"{layer}.{kind}" in self.keys

    def parameter(self, layer: str, kind: str = "weight") -> Tensor:
        """One weight or bias in fp32, in the shape that diffusers gives it."""
        there = self.store.get(self.keys[f"{layer}.{kind}"])
        return there.float().reshape(self.shape(layer, kind))

    def shape(self, layer: str, kind: str = "weight") -> torch.Size:
        return self.skeleton.get_parameter(f"{layer}.{kind}").shape

    def empty(self, layer: str) -> Tensor:
        """A layer's weight without values."""
        return torch.empty(self.shape(layer), device="meta")

    def weight(self, layer: str) -> Tensor:
        """A layer's weight, fp32."""
        return self.parameter(layer)

    def alone(self, layer: str, weight: Tensor) -> nn.Module:
        """A model of which only that layer exists, under its own name, with that weight."""
        module = type(self.layers[layer]).__new__(type(self.layers[layer]))
        nn.Module.__init__(module)
        module.weight = nn.Parameter(weight, requires_grad=False)
        return nested(layer, module)


def nested(name: str, module: nn.Module) -> nn.Module:
    """`module` as the submodule `name` of a module with no other."""
    for part in reversed(name.split(".")):
        outer = nn.Module()
        outer.add_module(part, module)
        module = outer
    return module


def open_model_files(files: list[Path], path: str) -> TensorStore:
    if not files:
        raise ModelError(f"{path} has no .safetensors weights")
    try:
        return TensorStore(files)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: a file of it is no readable .safetensors file: {error}") from error
