"""Models and adapters for the tests of the tools: the embedded model as folder and file, and adapters."""

import functools
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import train_lora
from adapter_files import files
from adapter_files.reader import import_layers
from adapter_files.writers import FileContent
from helpers.adapter_file_cases import SPECS, names, on_layers, unet, written
from helpers.ldm import save_single_file
from helpers.project import BASE
from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import attach_from_file

METADATA = {
    "ss_steps": "12", "ss_sd_model_name": "base.safetensors", "ss_output_name": "cat", "note": "kept",
    "ss_tag_frequency": json.dumps({"5_cat": {"cat": 3, "sofa": 1}, "1_dog": {"dog": 2, "sofa": 4}}),
    "modelspec.trigger_phrase": "a cat", "ss_resolution": "(64, 64)", "sshs_model_hash": "old",
}  # fmt: skip
CASES = [case for case in SPECS if case != "LoRA with biases"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def base_folder(path: Path, shards: int = 1) -> Path:
    """Write the embedded model with fp32 weights, those of the UNet in one or several files."""
    shutil.copytree(BASE, path)
    unet = path / "unet"
    tensors = {key: tensor.float() for key, tensor in load_file(unet / WEIGHTS).items()}
    if shards == 1:
        save_file(tensors, unet / WEIGHTS, {"format": "pt"})
        return path
    (unet / WEIGHTS).unlink()
    place = {}
    for number in range(shards):
        name = f"diffusion_pytorch_model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, unet / name, {"format": "pt"})
        place |= dict.fromkeys(part, name)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": place})
    (unet / f"{WEIGHTS}.index.json").write_text(text)
    return path


def base_file(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    save_single_file(BASE, path, dtype)
    return path


def adapter_file(path: Path, adapted: AdaptedModel, file_format: str = "kohya") -> Path:
    """Write an adapter as a file, or as a folder of PEFT, with metadata as trainers write it."""
    return save(path, written(adapted, file_format))


def save(path: Path, content: FileContent) -> Path:
    metadata = {**content.metadata, **METADATA}
    if content.config is None:
        save_file(content.tensors, path, metadata)
        return path
    path.mkdir()
    save_file(content.tensors, path / "adapter_model.safetensors", metadata)
    (path / "adapter_config.json").write_text(json.dumps(content.config))
    return path


@functools.cache
def adapted_in(case: str) -> AdaptedModel:
    """Return a shared adapter. Tests must not change it."""
    return on_layers(case)


@functools.cache
def content_of(case: str, file_format: str) -> FileContent:
    return written(adapted_in(case), file_format)


def of_case(folder: Path, case: str, file_format: str = "kohya") -> tuple[Path, AdaptedModel]:
    """Write an adapter of a case on ten layers; return the file and the adapter."""
    name = case.replace(" ", "_") + ("" if file_format == "peft" else ".safetensors")
    return save(folder / name, content_of(case, file_format)), adapted_in(case)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def unet_weights(model: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted((model / "unet").glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def relative_error(there: Tensor, here: Tensor) -> float:
    return float((there - here).norm() / here.norm())


def run(*words) -> int:
    try:
        return train_lora.main([str(word) for word in words])
    except SystemExit as stopped:  # raised by tyro for wrong names and types
        return stopped.code


@functools.cache
def scratch() -> nn.Module:
    return unet()


def deltas(path) -> dict[str, torch.Tensor]:
    """Return the updates that a file makes of the embedded UNet. The UNet is unchanged afterwards."""
    model = scratch()
    layers, unknown = import_layers(*files.read_adapter(path), model, names())
    adapted = attach_from_file(model, layers, unknown)
    found = dict(adapted.deltas())
    for name, layer in adapted.layers().items():
        model.set_submodule(name, layer.base_layer)
    return found


def assert_same_updates(path, adapted, error=2e-6):
    there, here = deltas(path), dict(adapted.deltas())
    assert there.keys() == here.keys()
    assert max(relative_error(there[name], here[name]) for name in here) < error
