"""Import of adapter files of all programs: the tensors of each layer, under the names used here."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapter_files import fused_weights, row_slices
from adapter_files.files import base_weights
from adapter_files.keys import group_keys, guess_model, split_key
from adapter_files.normalize import (
    for_weight,
    layer_errors,
    widen,
    with_alpha,
    without_foreign_tensors,
)
from adapter_files.peft_config import config_in, scale_by_config
from adapter_files.spellings import LayerSpellings
from common.errors import AdapterError
from lora_algos.targets import layers_of
from lora_algos.tensors import ALPHA, LayerTensors
from lora_algos.traits import Layers, Metadata
from models.layer_names.names import swap_halves


class ImportedLayers(NamedTuple):
    """The content of an adapter file."""

    layers: Layers
    """Layer -> its tensors, fp32 (fp64 if they are), by their names here."""
    errors: list[str]
    """A line for each tensor that belongs to no layer, and for each layer that is damaged."""


def import_layers(
    tensors: dict[str, Tensor],
    metadata: Metadata,
    model: nn.Module,
    names: LayerSpellings,
) -> ImportedLayers:
    """Assign a file's tensors to the layers of `model`.

    Raises AdapterError if PEFT's config in the metadata cannot be used."""
    weights = base_weights(model)
    modules = dict(layers_of(model))
    config = config_in(metadata)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    keys_by_layer, errors = group_keys(shapes, names.layers_by_spelling(weights))
    if errors and not keys_by_layer:
        other_model = guess_model(tensors)
        if other_model:
            errors.insert(0, f"the file looks like one for {other_model}")
    layers: Layers = {}
    for layer, keys in keys_by_layer.items():
        reader = LayerReader(
            layer, weights[layer], has_bias(modules[layer]), names, metadata, config
        )
        try:
            layer_tensors = reader.read(keys, tensors)
        except (AdapterError, RuntimeError) as error:
            errors.append(f"{layer}: {error}")
            continue
        if layer_tensors:
            layers[layer] = layer_tensors
    return ImportedLayers(layers, errors)


def has_bias(layer: nn.Module) -> bool | None:
    """Return whether a layer has a bias; None if that is not known: it has only a weight."""
    if "bias" not in layer._parameters:
        return None
    return layer._parameters["bias"] is not None


@dataclass(frozen=True)
class LayerReader:
    """Reader of one layer's tensors in a file."""

    layer: str
    weight: Tensor
    has_bias: bool | None
    names: LayerSpellings
    metadata: Metadata
    config: dict[str, Any]
    """PEFT's config."""

    def read(self, keys: dict[str, str], file_tensors: dict[str, Tensor]) -> LayerTensors:
        """Return the layer's tensors. `keys`: name of a tensor here -> its key in the file.

        Empty if the file changes only other layers of a fused weight. Raises AdapterError if the
        tensors are damaged."""
        own_tensors: LayerTensors = {}
        original_tensors: LayerTensors = {}
        for name, key in keys.items():
            if self.names.names_other_weight(split_key(key).spelling, self.layer):
                original_tensors[name] = file_tensors[key]
            else:
                own_tensors[name] = file_tensors[key]
        tensors = self._normalize(own_tensors, self.weight)
        if original_tensors:
            tensors |= self._from_original(original_tensors)
        return for_weight(tensors, self.weight, self.metadata)

    def _from_original(self, tensors: LayerTensors) -> LayerTensors:
        """Return the layer's tensors, given those of the original model's weight."""
        rows = self.names.slices.get(self.layer)
        if rows is None:
            weight = swap_halves(self.weight)
            tensors = for_weight(self._normalize(tensors, weight), weight, self.metadata)
            return fused_weights.swap_adapter(tensors, weight)
        num_rows = self.names.num_fused_rows(self.layer)
        shape = torch.Size((num_rows, *self.weight.shape[1:]))
        tensors = self._normalize(tensors, torch.empty(shape, device="meta"))
        return row_slices.adapter_of_rows(tensors, shape, rows)

    def _normalize(self, tensors: LayerTensors, weight: Tensor) -> LayerTensors:
        """Return the tensors in the form used here, except those that depend on the weight."""
        if not tensors:
            return {}
        errors = layer_errors(tensors, weight, self.has_bias)
        if errors:
            raise AdapterError("; ".join(errors))
        tensors = widen(tensors)
        if self.config and ALPHA not in tensors:
            tensors = scale_by_config(self.config, self.layer, tensors)
        return without_foreign_tensors(with_alpha(tensors, self.metadata))
