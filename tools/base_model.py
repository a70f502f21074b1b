"""A base model on disk, as the commands see it: layers without values, and one weight at a time."""

import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from adapter_files.safetensors_stream import TensorInfo, TensorStore
from adapter_files.spellings import layer_spellings
from common.errors import ModelError, error_list
from lora_algos.targets import adaptable_layers, norm_layers
from models.config import ModelConfig
from models.detect import get_family
from models.layer_loading import open_weights
from models.layer_names.names import swap_halves
from models.quantized_weight import plain_values
from models.weight_file import PLAIN_VALUES, WHOLE_TENSOR, WeightFile

SUFFIXES = ("weight", "bias")
"""Tensors of a layer."""


Shape = tuple[int, ...]


class LayerTensor(NamedTuple):
    """The weight or the bias of a layer."""

    layer: str
    suffix: str


class BaseModel:
    """The denoiser of a model. Raises ModelError if it is of another family, or incomplete."""

    def __init__(self, config: ModelConfig):
        self.family = get_family(config)
        self.skeleton = self.family.empty_denoiser()
        denoiser_files = self.family.identity_files("denoiser")
        self.files = [file for file in denoiser_files if file.suffix == ".safetensors"]
        self.quantized_file: WeightFile | None = None
        """A single file of quantized weights, or GGUF, which only some commands can read."""
        files = self.family.files
        if not files.has_plain_tensors:
            self.quantized_file = open_weights(files.path)
            self.store = TensorStore([])
        else:
            self.store = open_files(self.files, str(config.path))
        self.file_keys = self.family.stored_keys(self.skeleton)
        """Parameter name -> key in the file."""
        self.layers: dict[str, nn.Module] = {
            **adaptable_layers(self.skeleton),
            **norm_layers(self.skeleton),
        }
        self.names = layer_spellings(self.family, self.skeleton)
        self.natives = {}
        # in a single file, a tensor may consist of several layers
        if self.family.files.is_single_file:
            self.natives = self.family.layer_names.original(self.skeleton)
        self.layers_of_key = self._layers_by_key()
        """Key in the file -> the layers that the tensor consists of."""
        self._check_complete(str(config.path))

    def _layers_by_key(self) -> dict[str, list[LayerTensor]]:
        by_key: dict[str, list[LayerTensor]] = {}
        for layer, suffix in product(self.layers, SUFFIXES):
            name = parameter_name(layer, suffix)
            key = self.file_keys.get(name)
            if key is not None:
                entries = by_key.setdefault(key, [])
                entries.append(LayerTensor(layer, suffix))
        return by_key

    def _check_complete(self, path: str) -> None:
        """Raise ModelError naming all parameters that are missing or unusable."""
        errors = []
        stored_shapes = {key: info.shape for key, info in self.store.infos.items()}
        if self.quantized_file is not None:
            stored_shapes = self.family.files.shapes
        for name, parameter in self.skeleton.named_parameters():
            key = self.file_keys[name]
            stored_shape = stored_shapes.get(key)
            shape = tuple(parameter.shape)
            info = self.store.infos.get(key)
            if stored_shape is None:
                errors.append(f"{key}: missing")
            elif not self._has_shape(name, stored_shape, shape):
                errors.append(f"{key}: {stored_shape} in the file, {shape} by its config")
            elif info is not None and not info.dtype.is_floating_point:
                errors.append(f"{key}: quantized weights ({info.dtype}) are not supported")
        if errors:
            raise ModelError(error_list(f"{path} is incomplete", errors))

    def _has_shape(self, name: str, stored_shape: Shape, shape: Shape) -> bool:
        """Return whether a stored tensor of this shape contains the parameter."""
        layer = name.rpartition(".")[0]
        rows = self._rows(layer)
        if rows is None:
            return math.prod(stored_shape) == math.prod(shape)
        if stored_shape[1:] != shape[1:]:
            return False
        num_rows = sum(rows)
        return stored_shape[:1] >= (num_rows,)

    def _rows(self, layer: str) -> tuple[int, int] | None:
        """Return the first row and the number of rows that a layer has in the stored tensor.

        None: the tensor is the layer's own."""
        native = self.natives.get(layer)
        return None if native is None else native.row_slice

    def _is_swapped(self, layer: str) -> bool:
        """Return whether the stored tensor has the halves of the layer's rows in reverse order."""
        native = self.natives.get(layer)
        return native is not None and native.swapped_halves

    def learn_layers(self, infos: Mapping[str, TensorInfo], is_folder: bool) -> None:
        """Do nothing: the layers of a base model do not depend on an adapter file."""

    def has_parameter(self, layer: str, suffix: str) -> bool:
        """Return whether a layer has a weight or bias."""
        return parameter_name(layer, suffix) in self.file_keys

    def parameter(self, layer: str, suffix: str = "weight") -> Tensor:
        """Return a weight or bias.

        OUT: fp32, with the shape that it has in diffusers."""
        name = parameter_name(layer, suffix)
        key = self.file_keys[name]
        if self.quantized_file is not None:
            stored = self._read(self.quantized_file, layer, torch.float32, suffix)
            value = plain_values(stored)
            return value.reshape(self.shape(layer, suffix))
        stored = self.store.get(key)
        return self.extract_layer(stored, layer, suffix)

    def weight(self, layer: str) -> Tensor:
        """Return a layer's weight in fp32."""
        return self.parameter(layer)

    def stored_weight(self, layer: str) -> Tensor:
        """Return the stored tensor that a layer's weight is read from, perhaps quantized.

        A quantized one has the rows of the layer alone."""
        key = self.file_keys[parameter_name(layer, "weight")]
        if self.quantized_file is None:
            return self.store.get(key)
        file = self.quantized_file
        dtype = torch.float32
        if file.format(key) is None:
            no_rows = slice(0, 0)
            stored = file.stored(key, no_rows)
            dtype = stored[PLAIN_VALUES].dtype
        return self._read(file, layer, dtype)

    def _read(
        self, file: WeightFile, layer: str, dtype: torch.dtype, suffix: str = "weight"
    ) -> Tensor:
        """Return a layer's weight or bias from a file whose weights may be quantized."""
        name = parameter_name(layer, suffix)
        key = self.file_keys[name]
        original = self.natives.get(layer, WHOLE_TENSOR)
        return file.read(key, dtype, original)

    def extract_layer(self, stored: Tensor, layer: str, suffix: str) -> Tensor:
        """Return a layer's weight or bias from the stored tensor that contains it.

        OUT: fp32, with the shape that it has in diffusers."""
        rows = self._rows(layer)
        if rows is not None:
            stored = stored.narrow(0, *rows)
        shape = self.shape(layer, suffix)
        value = stored.float().reshape(shape)
        if self._is_swapped(layer):
            value = swap_halves(value)
        return value

    def replace_layer(self, stored: Tensor, value: Tensor, layer: str) -> Tensor:
        """Return a stored tensor with the value of one layer replaced, rounded to its dtype."""
        if self._is_swapped(layer):
            value = swap_halves(value)
        rows = self._rows(layer)
        if rows is None:
            value = value.to(stored.dtype)
            return value.reshape(stored.shape)
        changed = stored.clone()
        changed_rows = changed.narrow(0, *rows)
        changed_rows.copy_(value)
        return changed

    def shape(self, layer: str, suffix: str = "weight") -> torch.Size:
        """Return the shape of a weight or bias in diffusers."""
        name = parameter_name(layer, suffix)
        return self.skeleton.get_parameter(name).shape

    def empty_weight(self, layer: str) -> Tensor:
        """Return a layer's weight without values."""
        return torch.empty(self.shape(layer), device="meta")

    def module_with(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """Return a model that has only some layers, and of these only the weights.

        IN: layer -> weight."""
        modules = {}
        for layer, weight in weights.items():
            layer_class = type(self.layers[layer])
            modules[layer] = module_with_weight(layer_class, weight)
        return nest_modules(modules)


def parameter_name(layer: str, suffix: str) -> str:
    """Return the name of a parameter. The layer without a name is the model itself."""
    return f"{layer}.{suffix}" if layer else suffix


def module_with_weight(module_class: type[nn.Module], weight: Tensor) -> nn.Module:
    """Return a module of a class that has nothing but a weight."""
    module = module_class.__new__(module_class)
    nn.Module.__init__(module)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def nest_modules(modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a module with these submodules, under their dotted names."""
    root = nn.Module()
    for name, module in modules.items():
        *outer_names, inner_name = name.split(".")
        parent = root
        for outer_name in outer_names:
            if outer_name not in parent._modules:
                parent.add_module(outer_name, nn.Module())
            parent = parent.get_submodule(outer_name)
        parent.add_module(inner_name, module)
    return root


def open_files(files: list[Path], path: str) -> TensorStore:
    """Open the weights of a model. Raises ModelError naming `path`, the path of the model."""
    if not files:
        raise ModelError(f"{path} has no .safetensors weights")
    try:
        return TensorStore(files)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: one of its files is not a readable .safetensors file: {error}"
        ) from error
