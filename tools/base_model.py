"""A base model as the sub-commands see it: its layers without weights, and each weight when it is
asked for."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from adapter_files.fused_weights import swap_halves
from adapter_files.layer_names import layer_names
from adapter_files.safetensors_stream import TensorInfo, TensorStore
from common.errors import ModelError, error_list
from lora_algos.targets import adaptable_layers, norm_layers
from models import get_family
from models.config import ModelConfig


class Model:
    """The denoiser of a model on disk. Raises ModelError if it is not one of its family, or not
    whole."""

    def __init__(self, config: ModelConfig):
        self.family = get_family(config)
        self.skeleton = self.family.empty_denoiser()
        self.files = [
            file
            for file in self.family.component_files("denoiser")
            if file.suffix == ".safetensors"
        ]
        self.store = open_model_files(self.files, str(config.path))
        self.keys = self.family.stored_names(self.skeleton)
        self.layers: dict[str, nn.Module] = {
            **adaptable_layers(self.skeleton),
            **norm_layers(self.skeleton),
        }
        self.names = layer_names(self.family, self.skeleton)
        # in a single file a layer may be a part of a tensor
        self.natives = self.family.native_names(self.skeleton) if self.family.path.is_file() else {}
        self.layers_of_key: dict[str, list[tuple[str, str]]] = {}
        """Key -> the layers, and weight or bias, that the tensor is."""
        for layer, kind in ((layer, kind) for layer in self.layers for kind in ("weight", "bias")):
            if self.has(layer, kind):
                self.layers_of_key.setdefault(self.keys[joined(layer, kind)], []).append(
                    (layer, kind)
                )
        self._check(str(config.path))

    def _check(self, path: str) -> None:
        faults = []
        for name, parameter in self.skeleton.named_parameters():
            info = self.store.infos.get(self.keys[name])
            if info is None:
                faults.append(f"{self.keys[name]}: missing")
            elif not self._fits(name, info.shape, parameter.shape):
                faults.append(
                    f"{self.keys[name]}: {info.shape} in the file, {tuple(parameter.shape)} by its config"
                )
            elif not info.dtype.is_floating_point:
                faults.append(f"{self.keys[name]}: quantized weights ({info.dtype}) are not read")
        if faults:
            raise ModelError(error_list(f"{path} is not whole", faults))

    def _fits(self, name: str, there: tuple[int, ...], wanted: torch.Size) -> bool:
        """Whether a tensor of that shape holds the parameter."""
        native = self.natives.get(name.rpartition(".")[0])
        if native is None or native.rows is None:
            return torch.Size(there).numel() == wanted.numel()
        return there[:1] >= (sum(native.rows),) and there[1:] == wanted[1:]

    def take_spellings(self, infos: Mapping[str, TensorInfo], folder: bool) -> None:
        """A model that is known needs no names from a file."""

    def has(self, layer: str, kind: str) -> bool:
        return joined(layer, kind) in self.keys

    def parameter(self, layer: str, kind: str = "weight") -> Tensor:
        """One weight or bias in fp32, in the shape that diffusers gives it."""
        return self.part(self.store.get(self.keys[joined(layer, kind)]), layer, kind)

    def part(self, stored: Tensor, layer: str, kind: str) -> Tensor:
        """A layer's weight or bias, fp32 and shaped as diffusers has it, of the tensor that the
        file has."""
        native = self.natives.get(layer)
        if native is not None and native.rows is not None:
            stored = stored.narrow(0, *native.rows)
        there = stored.float().reshape(self.shape(layer, kind))
        return swap_halves(there) if native is not None and native.swapped else there

    def put_part(self, stored: Tensor, value: Tensor, layer: str) -> Tensor:
        """`stored` with the layer's part of it replaced, and rounded to its dtype."""
        native = self.natives.get(layer)
        value = swap_halves(value) if native is not None and native.swapped else value
        if native is None or native.rows is None:
            return value.to(stored.dtype).reshape(stored.shape)
        changed = stored.clone()
        changed.narrow(0, *native.rows).copy_(value)
        return changed

    def shape(self, layer: str, kind: str = "weight") -> torch.Size:
        return self.skeleton.get_parameter(joined(layer, kind)).shape

    def empty(self, layer: str) -> Tensor:
        """A layer's weight without values."""
        return torch.empty(self.shape(layer), device="meta")

    def weight(self, layer: str) -> Tensor:
        """A layer's weight, fp32."""
        return self.parameter(layer)

    def alone(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A model of which only these layers exist, under their own names, with these weights."""
        return nested(
            {layer: bare(type(self.layers[layer]), weight) for layer, weight in weights.items()}
        )


def joined(layer: str, kind: str) -> str:
    """A parameter's name; the model itself, which can have some too, is the layer without a name."""
    return f"{layer}.{kind}" if layer else kind


def bare(kind: type[nn.Module], weight: Tensor) -> nn.Module:
    """A module that has a weight and nothing else."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def nested(modules: Mapping[str, nn.Module]) -> nn.Module:
    """A module with these submodules and no others."""
    root = nn.Module()
    for name, module in modules.items():
        *path, last = name.split(".")
        outer = root
        for part in path:
            if part not in outer._modules:
                outer.add_module(part, nn.Module())
            outer = outer.get_submodule(part)
        outer.add_module(last, module)
    return root


def open_model_files(files: list[Path], path: str) -> TensorStore:
    if not files:
        raise ModelError(f"{path} has no .safetensors weights")
    try:
        return TensorStore(files)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: a file of it is no readable .safetensors file: {error}"
        ) from error
