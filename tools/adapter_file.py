"""An adapter file, as the commands see it: keys grouped by layer, and one layer at a time."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from adapter_files import files
from adapter_files.keys import group_keys, guess_model, split_key
from adapter_files.reader import import_layers
from adapter_files.safetensors_stream import TensorStore
from common.errors import AdapterError, error_list
from lora_algos.detection import detect_algorithm, layer_delta
from lora_algos.tensors import BIAS, LayerTensors
from tools.base_model import BaseModel
from tools.unknown_model import UnknownModel, format_of


class LayerData(NamedTuple):
    """A layer's tensors, and the weight that they change: without values if no model is given."""

    tensors: LayerTensors
    weight: Tensor


@dataclass
class AdapterFile:
    """A file of any program, or a folder of PEFT. Raises AdapterError if it is not readable."""

    path: Path
    model: BaseModel | UnknownModel
    drop: tuple[str, ...] = ()
    """Regular expressions. Keys that match one completely are ignored."""
    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    """Layer -> name of a tensor in lora_algos -> its key in the file."""
    key_errors: list[str] = field(default_factory=list)
    """A line for each key that belongs to no layer of the model."""
    dropped_keys: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        file, config = files.weights_and_config(self.path)
        self.store = open_file(file)
        self.metadata = {**self.store.metadata[file], **config}
        self._group_keys()
        if self.layers or self.key_errors:
            return
        reason = ": --drop leaves all of them out" if self.drop else ""
        raise AdapterError(f"{self.path} has no tensors{reason}")

    def _group_keys(self) -> None:
        """Group the keys by layer, in the order of the model's layers."""
        infos = self.store.infos
        self.model.learn_layers(infos, self.path.is_dir())
        shapes = {}
        for key, info in infos.items():
            if self._is_dropped(key):
                self.dropped_keys.append(key)
            else:
                shapes[key] = info.shape
        layers_by_spelling = self.model.names.layers_by_spelling(self.model.layers)
        groups, self.key_errors = group_keys(shapes, layers_by_spelling)
        for layer in self.model.layers:
            if layer in groups:
                self.layers[layer] = groups[layer]
        for layer in list(self.layers):
            if self._changes_only_siblings(layer):
                del self.layers[layer]

    def _is_dropped(self, key: str) -> bool:
        return any(re.fullmatch(pattern, key) for pattern in self.drop)

    def _changes_only_siblings(self, layer: str) -> bool:
        """Return whether the tensors for a fused weight leave this layer of it unchanged."""
        names = self.model.names
        if layer not in names.slices:
            return False
        for key in self.layers[layer].values():
            if not names.names_other_weight(split_key(key).spelling, layer):
                return False
        try:
            weight = self.model.empty_weight(layer)
            return self._read_tensors(layer, weight) == {}
        except AdapterError:
            return False  # the error is reported when the layer is read

    def check_keys(self) -> None:
        """Raise AdapterError naming the keys that belong to no layer."""
        if not self.key_errors:
            return
        errors = list(self.key_errors)
        model_name = guess_model(self.store.infos)
        if model_name and not self.layers:
            errors.insert(0, f"the file looks like one for {model_name}")
        num_errors = len(self.key_errors)
        num_keys = len(self.store.infos)
        heading = (
            f"{self.path} does not fit the model: {num_errors} of {num_keys} keys belong to no "
            "layer (--drop leaves keys out)"
        )
        raise AdapterError(error_list(heading, errors))

    def check_layers(self) -> None:
        """Raise AdapterError naming the layers whose tensors are damaged or do not fit the
        model."""
        errors = []
        for layer in self.layers:
            try:
                self.read(layer)
            except AdapterError as error:
                errors.append(f"{layer}: {error}")
        if errors:
            raise AdapterError(error_list(f"{self.path} cannot be used", errors))

    def file_format(self) -> str:
        """Return the format whose keys are most similar to those of the file."""
        if isinstance(self.model, UnknownModel):
            return self.model.file_format
        if self.path.is_dir():
            return "peft"
        keys: list[str] = []
        for keys_by_name in self.layers.values():
            keys += keys_by_name.values()
        return format_of(keys) or self.model.family.layer_names.file_formats[-1]

    @property
    def num_bytes(self) -> int:
        """Return the size of all tensors."""
        return sum(info.size for info in self.store.infos.values())

    def dtype_counts(self) -> dict[torch.dtype, int]:
        """Return dtype -> number of tensors, the most frequent dtype first. Alphas do not count."""
        counts: dict[torch.dtype, int] = {}
        for key, info in self.store.infos.items():
            if key.endswith(".alpha"):
                continue
            counts.setdefault(info.dtype, 0)
            counts[info.dtype] += 1
        by_count = sorted(counts.items(), key=lambda item: -item[1])
        return dict(by_count)

    def layer_tensors(self, layer: str, weight: Tensor) -> LayerTensors:
        """Return a layer's tensors in fp32. Raises AdapterError if they are damaged."""
        tensors = self._read_tensors(layer, weight)
        if not tensors:
            raise AdapterError("the file has no tensors for this layer")
        return tensors

    def _read_tensors(self, layer: str, weight: Tensor) -> LayerTensors:
        """Return a layer's tensors; none if the file changes only other layers of its fused
        weight."""
        stored_tensors = {}
        for key in self.layers[layer].values():
            stored_tensors[key] = self.store.get(key)
        module = self.model.module_with({layer: weight})
        layers, errors = import_layers(stored_tensors, self.metadata, module, self.model.names)
        if errors:
            messages = [error.removeprefix(f"{layer}: ") for error in errors]
            raise AdapterError("; ".join(messages))
        return layers.get(layer, {})

    def read(self, layer: str) -> LayerData:
        """Return a layer's tensors and weight. Raises AdapterError if they do not fit."""
        weight = self.model.weight(layer)
        tensors = self.layer_tensors(layer, weight)
        algorithm = detect_algorithm(tensors)
        algorithm.read_spec(tensors, weight.shape)
        reads_weight = algorithm.traits.needs_base_weight and not weight.is_meta
        if reads_weight and not weight.isfinite().all():
            raise AdapterError("the model's weight is not finite (NaN or infinite values)")
        if BIAS in tensors:
            self._check_bias(layer, tuple(tensors[BIAS].shape))
        return LayerData(tensors, weight)

    def _check_bias(self, layer: str, shape: tuple[int, ...]) -> None:
        """Raise AdapterError if the update of a bias does not fit the layer."""
        if isinstance(self.model, UnknownModel):
            return
        if not self.model.has_parameter(layer, "bias"):
            raise AdapterError(f"{BIAS} is {shape}, and the layer has no bias")
        expected_shape = tuple(self.model.shape(layer, "bias"))
        if shape != expected_shape:
            raise AdapterError(f"{BIAS} is {shape} and should be {expected_shape}")


def open_file(path: Path) -> TensorStore:
    """Open an adapter file. Raises AdapterError if it is not readable."""
    try:
        return TensorStore([path])
    except (SafetensorError, OSError) as error:
        raise files.unreadable_error(path, error) from error


def needs_base(tensors: LayerTensors, weight: Tensor) -> bool:
    """Return whether an update cannot be computed, because it depends on an unknown base weight."""
    return weight.is_meta and detect_algorithm(tensors).traits.needs_base_weight


def delta_of(tensors: LayerTensors, weight: Tensor) -> Tensor:
    """Return the update of `weight`, fp32. Raises AdapterError if it depends on an unknown
    weight."""
    if needs_base(tensors, weight):
        raise AdapterError(f"{detect_algorithm(tensors).name} needs --model")
    return layer_delta(tensors, weight)
