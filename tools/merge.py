"""`merge`: adapters worked into the weights of a base model, in the dtypes that these are stored
in."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from adapter_files.safetensors_stream import write_tensors
from common.atomic import new_file, new_folder
from common.errors import ModelError
from lora_algos import get_algorithm
from lora_algos.detection import algorithm_name
from tools.adapter_file import AdapterFile, delta_of
from tools.base_model import Model
from tools.copy_model import copy_rest
from tools.options import Merge
from tools.rewrite import ToolError
from tools.tables import Report


def run(options: Merge) -> int:
    """Merges. Returns the exit code."""
    model = Model(options.model_config(options.model))
    loras = [
        (AdapterFile(Path(path), model, options.drop), strengths[0])
        for path, strengths in options.loras().items()
    ]
    for adapter, _ in loras:
        adapter.require_all_known()
        adapter.require_all_whole()
    merging = Merging(model, loras)
    left_out: list[Path] = []
    out = Path(options.out)
    root = model.family.path
    if root.is_file():
        with new_file(out) as beside:
            merging.write(root, beside)
    else:
        with new_folder(out) as beside:
            left_out = copy_rest(root, beside, model.files)
            for file in model.files:
                merging.write(file, beside / file.relative_to(root))
    print(merging.summary())
    if left_out:
        print(f"not copied, as nothing is merged into them: {', '.join(map(str, left_out))}")
    print(f"written {out}")
    return 0


@dataclass
class Merging:
    """A base model and the adapters, with their strengths, that go into it."""

    model: Model
    loras: list[tuple[AdapterFile, float]]
    report: Report = field(default_factory=lambda: Report(with_error=False))
    of_base: set[str] = field(default_factory=set)
    """Algorithms seen whose update is a function of the base's weight."""

    def write(self, source: Path, target: Path) -> None:
        """Writes one file of the model, tensor by tensor; what no adapter changes is copied bit for
        bit."""
        keys = self.model.store.keys_in(source)
        infos = {key: self.model.store.infos[key] for key in keys}
        tensors = ((key, self.merged(key)) for key in keys)
        write_tensors(target, infos, tensors, self.model.store.metadata[source])

    def merged(self, key: str) -> Tensor:
        """One tensor of the model, as it is stored."""
        stored = self.model.store.get(key)
        for layer, kind in self.model.layers_of_key.get(key, ()):
            stored = self.with_layer(stored, key, layer, kind)
        return stored

    def with_layer(self, stored: Tensor, key: str, layer: str, kind: str) -> Tensor:
        """A tensor with what the adapters change in the layer's part of it."""
        parts = [(adapter, strength) for adapter, strength in self.loras if layer in adapter.layers]
        if kind == "bias":
            parts = [
                (adapter, strength)
                for adapter, strength in parts
                if "diff_b" in adapter.layers[layer]
            ]
        if not parts:
            return stored
        weight = self.model.part(stored, layer, kind)
        total, words = weight.new_zeros(weight.shape), set()
        for adapter, strength in parts:
            if kind == "bias":
                total += strength * adapter.tensors(layer, self.model.weight(layer))["diff_b"]
            else:
                tensors = adapter.tensors(layer, weight)
                words.add(algorithm_name(tensors))
                total += strength * delta_of(tensors, weight)
        if kind == "weight":
            self.of_base |= {name for name in words if get_algorithm(name).traits.needs_base_weight}
            self.report.add(
                layer,
                {"algorithm": ", ".join(sorted(words)), "files": len(parts)},
                float(total.norm()),
            )
        if not weight.isfinite().all():
            raise ModelError(f"{key}: not finite (NaN or infinite values) in the model")
        merged = weight + total
        if not merged.isfinite().all():
            raise ToolError(
                f"{key}: what the adapters add to it is not finite (NaN or infinite values)"
            )
        if (
            merged.numel() and merged.abs().max() > torch.finfo(stored.dtype).max
        ):  # which fp8 would cut off unsaid
            raise ToolError(
                f"{key}: merged, its values are too large for {stored.dtype}, the dtype of the model"
            )
        return self.model.put_part(stored, merged, layer)

    def summary(self) -> str:
        """What was merged."""
        lines = [
            f"{adapter.path} x {strength:g}: {len(adapter.layers)} layers"
            for adapter, strength in self.loras
        ]
        dropped = sum(len(adapter.dropped) for adapter, _ in self.loras)
        lines += [f"left out by --drop: {dropped} keys"] if dropped else []
        if self.of_base:
            lines.append(
                f"{', '.join(sorted(self.of_base))}: strength x dW, each dW being made of the original W; "
                "programs that apply one file after another, or to an already changed W, differ"
            )
        return "\n".join([str(self.report), *lines])
