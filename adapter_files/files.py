"""Adapter files: the only place that knows their keys. Reading takes every program's names, writing
chooses one format."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from adapter_files import convert, fused_weights
from adapter_files.keys import Names, group_keys, looks_like
from adapter_files.normalize import faults_of, widened, with_magnitude, without_cores
from adapter_files.writers import (
    DORA_NORM,
    OF_BASE,
    WRITERS,
    FileContent,
    Layers,
    preferred,
    stored_dtype,
)
from common.errors import AdapterError, error_list
from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import adaptable_layers, layers_of, norm_layers
from lora_algos.tensors import known_rank, moved

__all__ = [
    "MOST_ERROR",
    "WRITERS",
    "FileContent",
    "Layers",
    "Names",
    "content_of",
    "file_and_config",
    "from_file",
    "layers_of_adapted",
    "preferred",
    "read",
    "to_bytes",
    "to_file",
    "verify",
    "weights_of",
    "without_values",
]


MOST_ERROR = 1e-6  # of a file in fp32, read back, relative to the update


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file, or of PEFT's folder; AdapterError if it is not
    one."""
    path, config = file_and_config(Path(path))
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, {**(file.metadata() or {}), **config}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} is not a readable .safetensors file: {unreadable(path, error)}"
        ) from error


def unreadable(path: Path, error: Exception) -> str:
    """Why a file could not be read, and what to do."""
    try:
        start = path.open("rb").read(8)
    except OSError:
        return str(error)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return (
            "it is a pickle (.pt, .ckpt, .bin), which can run code when it is opened. Convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'adapter.safetensors')"
        )
    return f"{error}. A file that was cut short has to be copied again"


def file_and_config(path: Path) -> tuple[Path, dict[str, str]]:
    """The .safetensors file that `path` is or, for a folder of PEFT's, holds, and PEFT's adapter_config.json as
    metadata."""
    if not path.is_dir():
        return path, {}
    try:
        config = (path / "adapter_config.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(
            f"{path} is not a folder of PEFT's: adapter_config.json: {error}"
        ) from error
    return path / "adapter_model.safetensors", {"adapter_config": config}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The base weight of every layer that an adapter file can change, without an update that is
    merged into it."""
    layers: dict[str, Any] = {**adaptable_layers(model), **norm_layers(model)}
    unmerged = {
        name: layer.unmerged[0]
        for name, layer in AdaptedModel(model).layers().items()
        if layer.unmerged
    }
    return {name: unmerged.get(name, layer.weight) for name, layer in layers.items()}


def has_bias(layer: nn.Module) -> bool | None:
    """None: not known, of a layer that is there for its weight alone."""
    return layer._parameters["bias"] is not None if "bias" in layer._parameters else None


def from_file(
    tensors: dict[str, Tensor], metadata: dict[str, str], model: nn.Module, names: Names
) -> tuple[Layers, list[str]]:
    """A file's tensors by the layer of `model` they belong to; and a line for each that belongs to
    none, or is broken.

    The tensors are fp32 and have the names that the adapters here give them, whatever program wrote
    the file.
    """
    from adapter_files.peft_config import config_in

    weights, modules, config = weights_of(model), dict(layers_of(model)), config_in(metadata)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    found, unknown = group_keys(shapes, names.layer_of(weights))
    if unknown and not found and (what := looks_like(tensors)):
        unknown.insert(0, f"the file looks like one for {what}")
    result: Layers = {}
    for layer, keys in found.items():
        parts = [
            {
                name: tensors[key]
                for name, key in keys.items()
                if names.is_native(key, layer) == native
            }
            for native in (False, True)
        ]
        try:
            reader = LayerReader(
                layer, weights[layer], has_bias(modules[layer]), names, metadata, config
            )
            if tensors_here := reader.read(*parts):
                result[layer] = tensors_here
        except (AdapterError, RuntimeError) as error:
            unknown.append(f"{layer}: {error}")
    return result, unknown


@dataclass(frozen=True)
class LayerReader:
    """What one layer's tensors in a file are to the adapters here."""

    layer: str
    weight: Tensor
    has_bias: bool | None
    names: Names
    metadata: dict[str, str]
    config: dict

    def read(self, own: dict[str, Tensor], native: dict[str, Tensor]) -> dict[str, Tensor]:
        """IN: tensors for the layer itself, and tensors for the weight in the original model that it is part of. OUT:
        nothing if the file changes other parts of that alone. AdapterError if they are broken."""
        tensors = self.prepared(own, self.weight)
        if native:
            tensors |= self.from_native(native)
        return with_magnitude(tensors, self.weight, self.metadata.get(DORA_NORM) == OF_BASE)

    def from_native(self, native: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's own tensors."""
        part = self.names.rows.get(self.layer)
        if part is None:
            turned = fused_weights.swap(self.weight)
            tensors = with_magnitude(
                self.prepared(native, turned), turned, self.metadata.get(DORA_NORM) == OF_BASE
            )
            return fused_weights.swapped(tensors, turned)
        shape = torch.Size((self.names.native_rows(self.layer), *self.weight.shape[1:]))
        tensors = self.prepared(native, torch.empty(shape, device="meta"))
        return fused_weights.part_of(tensors, shape, part)

    def prepared(self, tensors: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
        """In fp32 and in the forms that the adapters here have, but for DoRA's magnitude."""
        from adapter_files.peft_config import scaled_by_config

        if not tensors:
            return {}
        if faults := faults_of(tensors, weight, self.has_bias):
            raise AdapterError("; ".join(faults))
        tensors = widened(tensors)
        if self.config and "alpha" not in tensors:
            tensors = scaled_by_config(self.config, self.layer, tensors)
        return without_cores(with_alpha(tensors, self.metadata))


def with_alpha(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    """A layer's tensors with the alpha that is understood where there is none, and in the units of
    ours."""
    if "oft_blocks" not in tensors:
        rank = known_rank(tensors)
        return (
            tensors
            if rank is None or "alpha" in tensors
            else {**tensors, "alpha": torch.tensor(float(rank))}
        )
    alpha, shape = (
        tensors.get("alpha", torch.tensor(0.0)),
        tensors["oft_blocks"].shape,
    )  # without one it is free
    if metadata.get("ss_network_module", "").startswith("lycoris"):
        # kohya's and LyCORIS' constraint is per output channel, ComfyUI's is the whole layer's
        alpha = alpha * torch.Size(shape[-3:-1]).numel()
    return {**tensors, "alpha": alpha}


def layers_of_adapted(adapted: AdaptedModel) -> Layers:
    """The adapter's tensors by layer, on the CPU, alpha among them. AdapterError naming the layers that have none: an
    update that is not finite, where it has to be decomposed."""
    layers: Layers = {}
    faults = []
    for name, layer in adapted.layers().items():
        try:
            tensors, alpha = layer.in_file()
        except AdapterError as error:
            faults.append(f"{name}: {error}")
            continue
        layers[name] = {key: tensor.to("cpu") for key, tensor in tensors.items()}
        layers[name]["alpha"] = torch.tensor(alpha)
    if faults:
        raise AdapterError(error_list("the adapter cannot be written", faults))
    return layers


def content_of(layers: Layers, model: nn.Module, names: Names, file_format: str) -> FileContent:
    """The layers in one of `write.WRITERS`' formats, as they are. AdapterError if it cannot hold
    them.

    Of layers without values the content has none either, and no weight of the model is looked at.
    """
    grouped = [
        name for name, layer in adaptable_layers(model).items() if getattr(layer, "groups", 1) > 1
    ]
    faults = [name for name in grouped if name in layers]
    if file_format in ("peft", "diffusers") and faults:
        what = f"--export.formats {file_format}: PEFT has another function for grouped convolutions"
        raise AdapterError(error_list(what, faults))
    weights = {
        name: weight.detach() for name, weight in weights_of(model).items() if name in layers
    }
    if any(tensor.is_meta for tensors in layers.values() for tensor in tensors.values()):
        weights = {name: weight.to("meta") for name, weight in weights.items()}
    return WRITERS[file_format](layers, weights, names)


def without_values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors as names and shapes; the alpha keeps its value."""
    return {
        name: tensor if name == "alpha" else tensor.to("meta") for name, tensor in tensors.items()
    }


def to_file(
    layers: Layers, model: nn.Module, names: Names, file_format: str, dtype: torch.dtype
) -> FileContent:
    """The layers in one of `write.WRITERS`' formats, in `dtype` (alphas and magnitudes in fp32)."""
    content = content_of(layers, model, names, file_format)
    content.tensors = {
        key: tensor.to(stored_dtype(key, dtype), copy=True).contiguous()
        for key, tensor in content.tensors.items()
    }
    if content.config is not None:
        content.metadata["format"] = "pt"  # PEFT writes it and transformers asks for it
    return content


def verify(content: FileContent, layers: Layers, model: nn.Module, names: Names) -> float:
    """Reads `content` back as a stranger would and compares what it does to the weights with what
    `layers` do.

    Returns the largest ||difference|| / ||update|| of a layer. Raises AdapterError naming keys that belong to no
    layer and layers that are missing: a file that says less than it should is not to be kept.
    """
    metadata = dict(content.metadata)
    if content.config is not None:
        metadata["adapter_config"] = json.dumps(content.config)
    found, unknown = from_file(content.tensors, metadata, model, names)
    weights = weights_of(model)
    missing = [
        f"{layer}: missing"
        for layer in layers.keys() - found.keys()
        if changes(
            layers[layer], weights[layer].detach()
        )  # in a fused weight, nothing is not written
    ]
    if unknown or missing:
        raise AdapterError(
            error_list(
                "what was written could not be read back and is not kept", [*unknown, *missing]
            )
        )
    return max(
        (difference(t, layers[layer], weights[layer].detach()) for layer, t in found.items()),
        default=0.0,
    )


def changes(tensors: dict[str, Tensor], weight: Tensor) -> bool:
    """Whether an adapter changes its layer at all."""
    delta = convert.delta_of(moved(tensors, weight.device), weight)
    return bool(delta.any()) or ("diff_b" in tensors and bool(tensors["diff_b"].any()))


def difference(there: dict[str, Tensor], here: dict[str, Tensor], weight: Tensor) -> float:
    """||difference|| / ||update|| of what two sets of a layer's tensors do, infinite if it is no
    number."""
    deltas = [convert.delta_of(moved(tensors, weight.device), weight) for tensors in (there, here)]
    size = deltas[1].norm()
    if (
        "lora_magnitude_vector" in here
    ):  # whose digits are those of the whole weight, not of its change
        size = size + weight.to(size.dtype).norm()
    errors = [relative(deltas[0] - deltas[1], size)]
    if "diff_b" in here:
        bias = there.get("diff_b", torch.zeros(()))  # in a fused weight, nothing is not written
        errors.append(relative(bias - here["diff_b"], here["diff_b"].norm()))
    return max(error if math.isfinite(error) else math.inf for error in errors)


def relative(error: Tensor, size: Tensor) -> float:
    """||error|| / size, and ||error|| where the size is 0."""
    return float(error.norm() / torch.where(size == 0, 1.0, size))


def to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The content of a .safetensors file."""
    return save(tensors, metadata)
