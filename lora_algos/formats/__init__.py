"""Adapter files: the only place that knows their keys. Reading takes every program's names, writing chooses one
format."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lora_algos.attach import Adapted, adaptable_layers, listed, norm_layers
from lora_algos.config import AdapterError
from lora_algos.formats import convert
from lora_algos.formats.layers import canonical
from lora_algos.formats.names import Names, group_keys, looks_like
from lora_algos.formats.write import DORA_NORM, OF_BASE, WRITERS, FileContent, Layers, stored_dtype

__all__ = [
    "MOST_ERROR", "WRITERS", "FileContent", "Layers", "Names", "file_and_config", "from_file", "layers_of_adapted",
    "read", "to_bytes", "to_file", "verify", "weights_of",
]  # fmt: skip


MOST_ERROR = 1e-6  # of a file in fp32, read back, relative to the update


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file, or of PEFT's folder; AdapterError if it is not one."""
    path, config = file_and_config(Path(path))
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, {**(file.metadata() or {}), **config}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is not a readable .safetensors file: {unreadable(path, error)}") from error


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
    except OSError as error:
        raise AdapterError(f"{path} is not a folder of PEFT's: {error}") from error
    return path / "adapter_model.safetensors", {"adapter_config": config}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The base weight of every layer that an adapter file can change."""
    return {name: layer.weight for name, layer in {**adaptable_layers(model), **norm_layers(model)}.items()}  # type: ignore[misc]


def from_file(
    tensors: dict[str, Tensor], metadata: dict[str, str], model: nn.Module, names: Names
) -> tuple[Layers, list[str]]:
    """A file's tensors by the layer of `model` they belong to; and a line for each that belongs to none, or is broken.

    The tensors are fp32 and have the names that the adapters here give them, whatever program wrote the file.
    """
    weights = weights_of(model)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    found, unknown = group_keys(shapes, names.layer_of(weights))
    if unknown and not found and (what := looks_like(tensors)):
        unknown.insert(0, f"the file looks like one for {what}")
    result: Layers = {}
    for layer, keys in found.items():
        parts = {name: tensors[key] for name, key in keys.items()}
        try:
            result[layer] = canonical(parts, weights[layer], metadata.get(DORA_NORM) == OF_BASE)
        except (AdapterError, KeyError, RuntimeError) as error:
            unknown.append(f"{layer}: {error}")
    supply_alphas(result, metadata)
    return result, unknown


def supply_alphas(layers: Layers, metadata: dict[str, str]) -> None:
    """Adds what stands in a file's metadata, or is understood, and not in its tensors."""
    from lora_algos.formats.peft_config import alphas_of, known_rank

    alphas = alphas_of(metadata, layers)
    for layer, tensors in layers.items():
        # without an alpha an update is scaled by 1, and a rotation is free
        alpha = alphas.get(layer, 0.0 if "oft_blocks" in tensors else known_rank(tensors))
        if alpha is not None and "alpha" not in tensors:
            tensors["alpha"] = torch.tensor(float(alpha))
    if metadata.get("ss_network_module", "").startswith("lycoris"):
        # kohya's and LyCORIS' constraint is per output channel, ComfyUI's is the whole layer's
        for tensors in layers.values():
            if "oft_blocks" in tensors and "alpha" in tensors:
                shape = tensors["oft_blocks"].shape
                tensors["alpha"] = tensors["alpha"] * (shape[-3] * shape[-1])


def layers_of_adapted(adapted: Adapted) -> Layers:
    """The adapter's tensors by layer, on the CPU, alpha among them."""
    layers: Layers = {}
    for name, layer in adapted.layers().items():
        tensors, alpha = layer.in_file()
        layers[name] = {key: tensor.to("cpu") for key, tensor in tensors.items()}
        layers[name]["alpha"] = torch.tensor(alpha)
    return layers


def to_file(layers: Layers, model: nn.Module, names: Names, file_format: str, dtype: torch.dtype) -> FileContent:
    """The layers in one of `write.WRITERS`' formats, in `dtype` (alphas in fp32)."""
    weights = {name: weight.detach().to("cpu") for name, weight in weights_of(model).items() if name in layers}
    content = WRITERS[file_format](layers, weights, names)
    content.tensors = {
        key: tensor.to(stored_dtype(key, dtype), copy=True).contiguous() for key, tensor in content.tensors.items()
    }
    if content.config is not None:
        content.metadata["format"] = "pt"  # PEFT writes it and transformers asks for it
    return content


def verify(content: FileContent, layers: Layers, model: nn.Module, names: Names) -> float:
    """Reads `content` back as a stranger would and compares what it does to the weights with what `layers` do.

    Returns the largest ||difference|| / ||update|| of a layer. Raises AdapterError naming keys that belong to no
    layer and layers that are missing: a file that says less than it should is not to be kept.
    """
    metadata = dict(content.metadata)
    if content.config is not None:
        metadata["adapter_config"] = json.dumps(content.config)
    found, unknown = from_file(content.tensors, metadata, model, names)
    missing = [f"{layer}: missing" for layer in layers.keys() - found.keys()]
    if unknown or missing:
        raise AdapterError(listed("what was written could not be read back and is not kept", [*unknown, *missing]))
    weights, worst = weights_of(model), 0.0
    for layer, tensors in layers.items():
        weight = weights[layer].detach()
        there, here = (
            convert.delta_of({k: t.to(weight.device) for k, t in x.items()}, weight) for x in (found[layer], tensors)
        )
        size = here.norm()
        if "lora_magnitude_vector" in tensors:  # whose digits are those of the whole weight, not of its change
            size = size + weight.norm()
        worst = max(worst, float((there - here).norm() / size) if size else float(there.norm()))
        if "diff_b" in tensors:
            worst = max(
                worst,
                float((found[layer]["diff_b"] - tensors["diff_b"]).norm() / tensors["diff_b"].norm().clamp_min(1e-30)),
            )
    return worst


def to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The content of a .safetensors file."""
    return save(tensors, metadata)
