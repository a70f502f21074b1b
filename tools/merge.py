"""`merge`: writes a base model with adapters merged into its weights, in the dtypes of the base
model."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from adapter_files.safetensors_stream import write_tensors
from common.atomic import new_file, new_folder
from common.errors import ModelError
from lora_algos.detection import detect_algorithm
from lora_algos.tensors import BIAS
from tools.adapter_file import AdapterFile, delta_of
from tools.base_model import BaseModel, LayerTensor
from tools.copy_model import copy_without
from tools.options import MergeOptions
from tools.rewrite import ToolError
from tools.tables import BlockTable


def run(options: MergeOptions) -> int:
    """Merge adapters into a model; return the exit code."""
    model = BaseModel(options.model_config(options.model))
    if model.quantized_file is not None:
        raise ModelError(
            f"MODEL {options.model}: has quantized weights, into which nothing can be merged. Use "
            "the model in bf16 or fp16"
        )
    loras = read_loras(options, model)
    merger = Merger(model, loras)
    foreign_weights = write_model(merger, Path(options.out))
    print(merger.table)
    for line in merger.summary_lines():
        print(line)
    if foreign_weights:
        names = ", ".join(map(str, foreign_weights))
        print(f"not copied, because nothing is merged into them: {names}")
    print(f"wrote {options.out}")
    return 0


@dataclass(frozen=True)
class StrongAdapter:
    """An adapter and its strength."""

    adapter: AdapterFile
    strength: float

    def changes(self, layer_tensor: LayerTensor) -> bool:
        """Return whether the adapter changes a weight or bias."""
        tensors = self.adapter.layers.get(layer_tensor.layer)
        if tensors is None:
            return False
        return layer_tensor.suffix == "weight" or "diff_b" in tensors


def read_loras(options: MergeOptions, model: BaseModel) -> list[StrongAdapter]:
    """Return the adapters with their strengths.

    Raises AdapterError if one of them does not fit the model."""
    loras = []
    for path, strengths in options.strengths().items():
        adapter = AdapterFile(Path(path), model, options.drop)
        loras.append(StrongAdapter(adapter, strengths[0]))
    for lora in loras:
        lora.adapter.check_keys()
        lora.adapter.check_layers()
    return loras


def write_model(merger: "Merger", out: Path) -> list[Path]:
    """Write the merged model; return files that were not copied."""
    source = merger.model.family.files.path
    if source.is_file():
        with new_file(out) as partial_path:
            merger.write(source, partial_path)
        return []
    with new_folder(out) as partial_path:
        foreign_weights = copy_without(source, partial_path, merger.model.files)
        for file in merger.model.files:
            target = partial_path / file.relative_to(source)
            merger.write(file, target)
    return foreign_weights


@dataclass
class Merger:
    """Merges adapters into the tensors of a base model."""

    model: BaseModel
    loras: list[StrongAdapter]
    table: BlockTable = field(default_factory=lambda: BlockTable(has_errors=False))
    base_algorithms: set[str] = field(default_factory=set)
    """Algorithms in the adapters whose update depends on the base weight."""

    def write(self, source: Path, target: Path) -> None:
        """Write one file of the model, tensor by tensor. Tensors that no adapter changes are copied
        bit for bit."""
        store = self.model.store
        keys = store.keys_in(source)
        infos = {key: store.infos[key] for key in keys}
        tensors = ((key, self.merge_tensor(key)) for key in keys)
        write_tensors(target, infos, tensors, store.metadata[source])

    def merge_tensor(self, key: str) -> Tensor:
        """Return a tensor of the merged model, in its stored dtype."""
        stored = self.model.store.get(key)
        for layer_tensor in self.model.layers_of_key.get(key, ()):
            stored = self.merge_layer(stored, key, layer_tensor)
        return stored

    def merge_layer(self, stored: Tensor, key: str, layer_tensor: LayerTensor) -> Tensor:
        """Return a stored tensor with the updates of one layer in it."""
        loras = [lora for lora in self.loras if lora.changes(layer_tensor)]
        if not loras:
            return stored
        layer, suffix = layer_tensor
        weight = self.model.extract_layer(stored, layer, suffix)
        if suffix == "bias":
            update = self.bias_update(layer, weight, loras)
        else:
            update = self.weight_update(layer, weight, loras)
        if not weight.isfinite().all():
            raise ModelError(f"{key}: not finite (NaN or infinite values) in the model")
        merged = weight + update
        check_values(merged, key, stored.dtype)
        return self.model.replace_layer(stored, merged, layer)

    def bias_update(self, layer: str, bias: Tensor, loras: list[StrongAdapter]) -> Tensor:
        """Return the sum of strength x update of a bias."""
        total = bias.new_zeros(bias.shape)
        for lora in loras:
            weight = self.model.weight(layer)
            tensors = lora.adapter.layer_tensors(layer, weight)
            total += lora.strength * tensors[BIAS]
        return total

    def weight_update(self, layer: str, weight: Tensor, loras: list[StrongAdapter]) -> Tensor:
        """Return the sum of strength x update of a weight, and add the layer to the table."""
        total = weight.new_zeros(weight.shape)
        algorithms = set()
        for lora in loras:
            tensors = lora.adapter.layer_tensors(layer, weight)
            algorithm = detect_algorithm(tensors)
            algorithms.add(algorithm.name)
            if algorithm.traits.needs_base_weight:
                self.base_algorithms.add(algorithm.name)
            total += lora.strength * delta_of(tensors, weight)
        attributes = {"algorithm": ", ".join(sorted(algorithms)), "files": len(loras)}
        self.table.add(layer, attributes, float(total.norm()))
        return total

    def summary_lines(self) -> list[str]:
        """Return lines about the adapters."""
        lines = []
        num_dropped_keys = 0
        for lora in self.loras:
            adapter = lora.adapter
            lines.append(f"{adapter.path} x {lora.strength:g}: {len(adapter.layers)} layers")
            num_dropped_keys += len(adapter.dropped_keys)
        if num_dropped_keys:
            lines.append(f"left out by --drop: {num_dropped_keys} keys")
        if self.base_algorithms:
            names = ", ".join(sorted(self.base_algorithms))
            lines.append(
                f"{names}: each dW is computed from the original W. Programs that apply one file "
                "after another, or to a W that is already changed, give a different result"
            )
        return lines


def check_values(merged: Tensor, key: str, dtype: torch.dtype) -> None:
    """Raise ToolError for values that are not finite, or too large for the stored dtype.

    Without this check, fp8 would clip them."""
    if not merged.isfinite().all():
        raise ToolError(
            f"{key}: the updates of the adapters are not finite (NaN or infinite values)"
        )
    if merged.numel() and merged.abs().max() > torch.finfo(dtype).max:
        raise ToolError(
            f"{key}: the merged values are too large for {dtype}, the dtype of the model"
        )
