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
from lora_algos.formats.names import Names, looks_like, split_key
from lora_algos.formats.write import DORA_NORM, OF_BASE, WRITERS, FileContent, Layers

__all__ = [
    "WRITERS", "FileContent", "Layers", "Names", "from_file", "layers_of_adapted", "read", "to_bytes", "to_file",
    "verify", "weights_of",
]  # fmt: skip


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file, or of PEFT's folder; AdapterError if it is not one."""
    path = Path(path)
    config = {}
    if path.is_dir():
        config = peft_folder_config(path)
        path = path / "adapter_model.safetensors"
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


def peft_folder_config(folder: Path) -> dict[str, str]:
    """PEFT's adapter_config.json as metadata."""
    try:
        return {"adapter_config": (folder / "adapter_config.json").read_text(encoding="utf-8")}
    except OSError as error:
        raise AdapterError(f"{folder} is not a folder of PEFT's: {error}") from error


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
    layer_of = names.layer_of(weights)
    found: Layers = {}
    unknown = []
    for key, tensor in tensors.items():
        spelling, name = split_key(key)
        if name and spelling in layer_of:
            found.setdefault(layer_of[spelling], {})[name] = tensor
        else:
            what = "no such layer in the model" if name else "no tensor of an adapter"
            unknown.append(f"{key} {tuple(tensor.shape)}: {what}")
    if unknown and not found and (what := looks_like(tensors)):
        unknown.insert(0, f"the file looks like one for {what}")
    result: Layers = {}
    for layer, parts in found.items():
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
        alpha = alphas.get(layer, known_rank(tensors))  # without an alpha a file is scaled by 1
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
        key: tensor.to(torch.float32 if key.endswith(".alpha") else dtype, copy=True).contiguous()
        for key, tensor in content.tensors.items()
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
