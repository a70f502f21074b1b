"""Adapter files: reading them from the disk, and their content in one of the formats."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from adapter_files import get_writer
from adapter_files.spellings import LayerSpellings
from adapter_files.writers import FORMATS_READ_BY_PEFT, FileContent, storage_dtype
from common.errors import AdapterError, error_list
from lora_algos.adapted_model import AdaptedModel
from lora_algos.frozen_weight import frozen_weight
from lora_algos.targets import adaptable_layers, norm_layers
from lora_algos.tensors import ALPHA, LayerTensors, to_device
from lora_algos.traits import Layers

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Files in a folder of PEFT."""
PICKLE_STARTS = (b"PK", b"\x80")


def read_adapter(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a .safetensors file or a folder of PEFT.

    Raises AdapterError if it is not readable."""
    path, config = weights_and_config(Path(path))
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, {**(file.metadata() or {}), **config}
    except (SafetensorError, OSError) as error:
        raise unreadable_error(path, error) from error


def unreadable_error(path: Path, error: Exception) -> AdapterError:
    """Return the error for a file that could not be read, with a hint."""
    return AdapterError(f"{path} is not a readable .safetensors file: {hint(path, error)}")


def hint(path: Path, error: Exception) -> str:
    """Return why a file could not be read, and what to do."""
    try:
        start = path.open("rb").read(8)
    except OSError:
        return str(error)
    if start.startswith(PICKLE_STARTS):
        return (
            "it is a pickle (.pt, .ckpt, .bin), which can run code when it is opened. Convert it "
            "where you trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), "
            "'adapter.safetensors')"
        )
    return f"{error}. If the file was cut short, copy it again"


def weights_and_config(path: Path) -> tuple[Path, dict[str, str]]:
    """Return the .safetensors file at `path`, and PEFT's config as metadata if `path` is a folder.

    Raises AdapterError for a folder without a readable config."""
    if not path.is_dir():
        return path, {}
    try:
        config = (path / PEFT_CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is not a folder of PEFT: {PEFT_CONFIG}: {error}") from error
    return path / PEFT_WEIGHTS, {"adapter_config": config}


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the base weight of every layer that an adapter file can change.

    An update that is merged into a weight is left out."""
    layers: dict[str, Any] = {**adaptable_layers(model), **norm_layers(model)}
    adapters = AdaptedModel(model).layers()
    weights = {}
    for name, layer in layers.items():
        adapter = adapters.get(name)
        weights[name] = frozen_weight(layer) if adapter is None else adapter.base_weight()
    return weights


def adapter_layers(adapted: AdaptedModel) -> Layers:
    """Return the adapter's tensors by layer, on the CPU.

    Raises AdapterError naming the layers whose update must be decomposed and is not finite."""
    layers: Layers = {}
    errors = []
    for name, layer in adapted.layers().items():
        try:
            tensors = layer.file_tensors()
        except AdapterError as error:
            errors.append(f"{name}: {error}")
            continue
        layers[name] = {key: tensor.to("cpu") for key, tensor in tensors.items()}
        layers[name][ALPHA] = layers[name][ALPHA].float()
    if errors:
        raise AdapterError(error_list("the adapter cannot be written", errors))
    return layers


def build_content(
    layers: Layers,
    model: nn.Module,
    names: LayerSpellings,
    file_format: str,
) -> FileContent:
    """Return the layers in a format, a key of FORMATS, in their own dtypes.

    Layers without values make a content without values; no weight is read then. Raises
    AdapterError if the format cannot hold the layers."""
    if file_format in FORMATS_READ_BY_PEFT:
        check_ungrouped(layers, model, file_format)
    has_values = not any(
        tensor.is_meta for tensors in layers.values() for tensor in tensors.values()
    )
    weights = {}
    for name, weight in base_weights(model).items():
        if name in layers:
            weights[name] = weight.detach() if has_values else weight.to("meta")
    return get_writer(file_format)(layers, weights, names)


def check_ungrouped(layers: Layers, model: nn.Module, file_format: str) -> None:
    """Raise AdapterError naming adapters of grouped convolutions."""
    grouped_layers = [
        name
        for name, layer in adaptable_layers(model).items()
        if name in layers and getattr(layer, "groups", 1) > 1
    ]
    if grouped_layers:
        heading = (
            f"--export.formats {file_format}: PEFT computes another function for grouped "
            "convolutions"
        )
        raise AdapterError(error_list(heading, grouped_layers))


def shapes_only(tensors: LayerTensors) -> LayerTensors:
    """Return a layer's tensors without values.

    The alpha keeps its value."""
    return to_device(tensors, torch.device("meta"))


def file_content(
    layers: Layers,
    model: nn.Module,
    names: LayerSpellings,
    file_format: str,
    dtype: torch.dtype,
) -> FileContent:
    """Return the layers in a format, a key of FORMATS, in `dtype` (alphas and magnitudes fp32)."""
    content = build_content(layers, model, names, file_format)
    for key, tensor in content.tensors.items():
        converted_tensor = tensor.to(storage_dtype(key, dtype), copy=True)
        content.tensors[key] = converted_tensor.contiguous()
    if content.config is not None:
        content.metadata["format"] = "pt"  # PEFT writes it and transformers requires it
    return content


def to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return the bytes of a .safetensors file."""
    return save(tensors, metadata)
