"""Loading of a denoiser's single file one weight at a time, in the format of its blocks."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.block_format import BlockFormat
from models.checkpoint_files import GGUF_SUFFIX, tensor_shapes
from models.gguf_file import GgufFile
from models.layer_names.names import OriginalLayer
from models.quantization import is_encoder_weight
from models.quantized_weight import QuantizedWeight, plain_values
from models.safetensors_file import SafetensorsFile
from models.weight_file import WHOLE_TENSOR, WeightFile


def open_weights(path: Path) -> WeightFile:
    """Open a file of weights. Raises OSError, SafetensorError or ModelError."""
    return GgufFile(path) if path.suffix == GGUF_SUFFIX else SafetensorsFile(path)


class LayerReader:
    """Reads the weights of a denoiser from an open file in the original layout."""

    def __init__(
        self,
        denoiser: nn.Module,
        file: WeightFile,
        keys: Mapping[str, str],
        originals: Mapping[str, OriginalLayer],
        layers: Mapping[str, nn.Module],
    ):
        """`denoiser`: without values. `keys`: parameter name -> key in the file. `originals`: where
        each layer is in the original model. `layers`: those that get the format of the blocks."""
        self.file, self.keys, self.originals, self.layers = file, keys, originals, layers
        self.exact_names = names_in_fp32(denoiser)
        self.shapes = {name: tensor.shape for name, tensor in denoiser.named_parameters()}

    def read(self, dtype: torch.dtype, blocks: BlockFormat) -> dict[str, Tensor]:
        """Return all weights by name, in `dtype`."""
        return {name: self._read(name, dtype, blocks) for name in self.keys}

    def empty_weights(self) -> dict[str, Tensor]:
        """Return weights of `layers` that stay quantized, without values, by name of the layer."""
        weights: dict[str, Tensor] = {}
        for layer_name, layer in self.layers.items():
            key = self.keys[f"{layer_name}.weight"]
            weight = empty_weight(self.file, key, layer)
            if weight is not None:
                weights[layer_name] = weight
        return weights

    def _read(self, name: str, dtype: torch.dtype, blocks: BlockFormat) -> Tensor:
        """Return a weight. It is in fp32 if a part of its name is one of `exact_names`."""
        names = name.split(".")
        if not self.exact_names.isdisjoint(names):
            dtype = torch.float32
        key = self.keys[name]
        layer, _, parameter = name.rpartition(".")
        original = self.originals.get(layer, WHOLE_TENSOR)
        weight = self.file.read(key, dtype, original)
        if layer in self.layers and parameter == "weight":
            return blocks.formatted(weight, self.file.is_quantized)
        values = plain_values(weight)
        if layer not in self.originals:
            values = values.view(
                self.shapes[name]
            )  # a table that the original model has as one row
        return values


def empty_weight(file: WeightFile, key: str, layer: Any) -> QuantizedWeight | None:
    """Return a layer's weight in the format that it has in a file, without values; None if plain."""
    format = file.format(key)
    if format is None or not file.is_quantized:
        return None
    weight = layer.weight
    stored = file.empty(key, len(weight))
    return QuantizedWeight(format, stored, weight.shape, weight.dtype)


def names_in_fp32(model: Any) -> set[str]:
    """Return the names of modules and parameters that stay in fp32 when a model is loaded in bf16."""
    names = getattr(model, "_keep_in_fp32_modules", None)
    if hasattr(model, "_keep_in_fp32_modules_strict"):  # transformers'; its other list is for fp16
        names = model._keep_in_fp32_modules_strict
    return set(names or ())


def read_encoder(path: Path, dtype: torch.dtype, layers: BlockFormat) -> dict[str, Tensor]:
    """Return the weights of a text encoder's file, in `dtype`, those of its layers in a format."""
    weights = {}
    keys = tensor_shapes(path)
    with open_weights(path) as file:
        for key in keys:
            weight = file.read(key, dtype)
            if is_encoder_weight(key, weight):
                weights[key] = layers.formatted(weight, file.is_quantized)
            else:
                weights[key] = plain_values(weight)
    return weights


def use_formats_of_file(encoder: nn.Module, path: Path) -> None:
    """Give layers of a text encoder without values the formats that their weights have in its file.

    Files differ from transformers in the beginning of names alone."""
    with open_weights(path) as file:
        if not file.is_quantized:
            return
        keys = {place_in_layers(key): key for key in tensor_shapes(path)}
        for name, module in encoder.named_modules():
            layer: Any = module
            key = keys.get(place_in_layers(f"{name}.weight"))
            if key is None or not is_encoder_weight(key, layer.weight):
                continue
            weight = empty_weight(file, key, layer)
            if weight is not None:
                layer.weight = nn.Parameter(weight, requires_grad=False)


def place_in_layers(key: str) -> str:
    """Return the part of a weight's name from the list of its layer on, such as layers.0."""
    match = re.search(r"[^.]+\.\d+\..*", key)
    return match[0] if match else key
