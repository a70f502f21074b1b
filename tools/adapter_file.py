"""An adapter file as the sub-commands see it: its layers by name, each read when it is asked for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from adapter_files import files
from adapter_files.keys import group_keys, guess_model, split_key
from adapter_files.reader import import_layers
from adapter_files.safetensors_stream import TensorStore
from common.errors import AdapterError, error_list
from lora_algos import get_algorithm
from lora_algos.detection import algorithm_name, detect_algorithm, layer_delta
from tools.base_model import Model
from tools.unknown_model import UnknownModel, format_of

LayerTensors = dict[str, Tensor]


@dataclass
class AdapterFile:
    """A file of any program's, or a folder of PEFT's. AdapterError if it is not readable."""

    path: Path
    model: Model | UnknownModel
    drop: tuple[str, ...] = ()
    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    """Layer -> name of a tensor here -> its key in the file."""
    unknown: list[str] = field(default_factory=list)
    """A line for each key that belongs to no layer of the model."""
    dropped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        file, config = files.weights_and_config(self.path)
        try:
            self.store = TensorStore([file])
        except (SafetensorError, OSError) as error:
            raise files.unreadable_error(file, error) from error
        self.metadata = {**self.store.metadata[file], **config}
        self._group()
        if not self.layers and not self.unknown:
            raise AdapterError(
                f"{self.path} holds no tensors"
                + (", all are left out by --drop" if self.drop else "")
            )

    def _group(self) -> None:
        self.model.take_spellings(self.store.infos, self.path.is_dir())
        infos = self.store.infos
        self.dropped = [
            key for key in infos if any(re.fullmatch(pattern, key) for pattern in self.drop)
        ]
        shapes = {key: info.shape for key, info in infos.items() if key not in self.dropped}
        self.layers, self.unknown = group_keys(
            shapes, self.model.names.layers_by_spelling(self.model.layers)
        )
        self.layers = {
            layer: self.layers[layer] for layer in self.model.layers if layer in self.layers
        }
        for layer in [layer for layer in self.layers if self._changes_others_alone(layer)]:
            del self.layers[layer]

    def _changes_others_alone(self, layer: str) -> bool:
        """Whether what the file has for a fused weight is of other layers that this is made of."""
        names = self.model.names
        if layer not in names.slices or not all(
            names.names_other_weight(split_key(key).spelling, layer)
            for key in self.layers[layer].values()
        ):
            return False
        try:
            return self._found(layer, self.model.empty(layer)) == {}
        except AdapterError:
            return False  # reading the layer says what is wrong with it

    def require_all_known(self) -> None:
        """AdapterError naming the keys that belong to no layer."""
        if not self.unknown:
            return
        looks = guess_model(self.store.infos)
        hint = [f"the file looks like one for {looks}"] if looks and not self.layers else []
        what = f"{self.path} does not fit the model: {len(self.unknown)} of {len(self.store.infos)} keys (--drop leaves"
        raise AdapterError(
            error_list(f"{what} out what matches a pattern)", [*hint, *self.unknown])
        )

    def require_all_whole(self) -> None:
        """AdapterError naming the layers whose tensors are damaged or do not fit the model's."""
        faults = []
        for layer in self.layers:
            try:
                self.read(layer)
            except AdapterError as error:
                faults.append(f"{layer}: {error}")
        if faults:
            raise AdapterError(error_list(f"{self.path} cannot be used", faults))

    def file_format(self) -> str:
        """The format of the file that is nearest to its keys."""
        if isinstance(self.model, UnknownModel):
            return self.model.file_format
        if self.path.is_dir():
            return "peft"
        return format_of(self.keys) or self.model.family.file_formats[-1]

    @property
    def keys(self) -> list[str]:
        """Those that belong to layers."""
        return [key for parts in self.layers.values() for key in parts.values()]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(info.size for info in self.store.infos.values())

    def dtypes(self) -> dict[torch.dtype, int]:
        """dtype -> number of tensors, the most frequent first; alphas do not count."""
        found: dict[torch.dtype, int] = {}
        for key, info in self.store.infos.items():
            if not key.endswith(".alpha"):
                found[info.dtype] = found.get(info.dtype, 0) + 1
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def tensors(self, layer: str, weight: Tensor) -> LayerTensors:
        """A layer's tensors under the names that adapters here have, fp32. AdapterError if they are
        damaged."""
        found = self._found(layer, weight)
        if not found:
            raise AdapterError("the file has nothing for it")
        return found

    def _found(self, layer: str, weight: Tensor) -> LayerTensors:
        """Nothing if the file changes other parts of a fused weight alone."""
        given = {key: self.store.get(key) for key in self.layers[layer].values()}
        found, faults = import_layers(
            given, self.metadata, self.model.alone({layer: weight}), self.model.names
        )
        if faults:
            raise AdapterError("; ".join(fault.removeprefix(f"{layer}: ") for fault in faults))
        return found.get(layer, {})

    def read(self, layer: str) -> tuple[LayerTensors, Tensor]:
        """A layer's tensors, and the weight that they are for, without values if none is known. AdapterError if they do
        not fit it."""
        weight = self.model.weight(layer)
        tensors = self.tensors(layer, weight)
        algorithm = detect_algorithm(tensors)
        algorithm.read_spec(tensors, weight.shape)
        needs_weight = algorithm.traits.needs_base_weight
        if needs_weight and not weight.is_meta and not weight.isfinite().all():
            raise AdapterError("the model's weight is not finite (NaN or infinite values)")
        if "diff_b" in tensors and isinstance(self.model, Model):
            there = tuple(tensors["diff_b"].shape)
            if not self.model.has(layer, "bias"):
                raise AdapterError(f"diff_b is {there}, and the layer has no bias")
            if there != (wanted := tuple(self.model.shape(layer, "bias"))):
                raise AdapterError(f"diff_b is {there} and should be {wanted}")
        return tensors, weight


def needs_base(algorithm: str, weight: Tensor) -> bool:
    """Whether an update cannot be had, as it is a function of the base's values and these are not
    known."""
    return weight.is_meta and get_algorithm(algorithm).traits.needs_base_weight


def delta_of(tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """The update of `weight`, fp32; AdapterError if it cannot be had without the base's values."""
    algorithm = algorithm_name(dict(tensors))
    if needs_base(algorithm, weight):
        raise AdapterError(f"{algorithm} needs --model")
    return layer_delta(dict(tensors), weight)
