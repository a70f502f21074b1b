"""The files of a finished run: the adapter with its metadata, and the base model with the adapter merged."""

import json
from pathlib import Path

import safetensors.torch
import torch

from adapter_files import convert, files
from adapter_files.safetensors_stream import addnet_hashes, training_metadata
from common.atomic import WriteError, new_folder, write_file
from common.errors import AdapterError, error_list
from lora_algos.attach import Adapted
from models.base import ModelFamily
from objectives.processes import sample_as_trained
from training.config import TrainConfig
from training.metadata import Parts, Provenance, file_metadata

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def write_adapter(config: TrainConfig, parts: Parts, provenance: Provenance) -> list[Path]:
    """Writes the adapter in every format asked for, each read back and compared before it takes its name."""
    adapted, names = parts.adapted, parts.names
    layers = converted(config, adapted)
    about = file_metadata(config, parts, layers, provenance)
    paths: list[Path] = []
    for file_format in config.export.format or (default_format(parts, layers),):
        exact = files.to_file(layers, adapted.model, names, file_format, torch.float32)
        error = files.verify(exact, layers, adapted.model, names)
        if not error <= files.MOST_ERROR:
            raise AdapterError(
                f"the {file_format} file changes the weights by {error:.1e} of what was trained, not kept"
            )
        content = files.to_file(layers, adapted.model, names, file_format, DTYPES[config.lora_dtype])
        content.metadata |= about
        content.metadata |= addnet_hashes(files.to_bytes(content.tensors, training_metadata(content.metadata)))
        path = Path(config.output_dir) / config.export.name
        ending = ".peft" if content.config is not None else f".{file_format}.safetensors" if paths else ".safetensors"
        paths.append(write_content(path.with_name(path.name + ending), content))
    return paths


def default_format(parts: Parts, layers: files.Layers) -> str:
    """Where none is asked for."""
    return files.preferred(parts.family.file_formats, layers, parts.names)


def check(config: TrainConfig, parts: Parts) -> None:
    """WHEN: before training. Raises AdapterError if what is being trained has no place in a format asked for."""
    if config.export.convert == "lora-svd":
        return  # whatever it was, then it is a LoRA
    model = parts.adapted.model
    if config.export.convert == "full":
        layers: files.Layers = {name: {"diff": weight} for name, weight in files.weights_of(model).items()}
    else:
        layers = converted(config, parts.adapted)
    layers = {name: files.without_values(tensors) for name, tensors in layers.items()}
    for file_format in config.export.format or (default_format(parts, layers),):
        files.content_of(layers, model, parts.names, file_format)


def write_content(path: Path, content: files.FileContent) -> Path:
    """One file, or a folder for PEFT, which is read back bit for bit before it takes its name."""
    data = files.to_bytes(content.tensors, content.metadata)
    there = safetensors.torch.load(data)
    if there.keys() != content.tensors.keys() or not all(t.equal(there[key]) for key, t in content.tensors.items()):
        raise WriteError(path, OSError("it does not read back as it was written"))
    if content.config is None:
        write_file(path, data)
    else:
        with new_folder(path) as beside:
            (beside / "adapter_model.safetensors").write_bytes(data)
            (beside / "adapter_config.json").write_text(json.dumps(content.config, indent=1), encoding="utf-8")
    return path


def converted(config: TrainConfig, adapted: Adapted) -> files.Layers:
    """The adapter's tensors by layer, as the algorithm that `export.convert` asks for."""
    layers, how = files.layers_of_adapted(adapted), config.export.convert
    if how == "none":
        return layers
    weights = {name: weight.detach().cpu() for name, weight in files.weights_of(adapted.model).items()}
    if how == "full":
        return {name: convert.full(tensors, weights[name]) for name, tensors in layers.items()}
    if how == "lora-exact":
        return {name: convert.lora_exact(tensors, weights[name].shape) for name, tensors in layers.items()}
    result, errors, faults = {}, [], []
    for name, tensors in layers.items():
        try:
            result[name], error = convert.nearest_lora(tensors, weights[name], config.export.svd_rank)
            errors.append((error, name))
        except AdapterError as fault:
            faults.append(f"{name}: {fault}")
    if faults:
        raise AdapterError(error_list("--export.convert lora-svd", faults))
    worst, name = max(errors)
    mean = sum(error for error, _ in errors) / len(errors)
    print(
        f"lora-svd of rank {config.export.svd_rank}: error {mean:.2%} of the update on average, {worst:.2%} in {name}"
    )
    return result


def write_merged(config: TrainConfig, family: ModelFamily, adapted: Adapted) -> Path:
    """Writes output_dir/model_with_lora: the whole pipeline, its denoiser in the dtype that the base is stored in."""
    path = Path(config.output_dir) / "model_with_lora"
    stored = family.stored_dtype()
    # each sum is made in fp32 and rounded once; float8 is too coarse for what was learned
    merged = family.load_denoiser(stored if stored.itemsize > 1 else torch.bfloat16)
    adapted.merge_into(merged)
    pipeline = sample_as_trained(family.pipeline(merged), config.objective)
    with new_folder(path) as beside:
        pipeline.save_pretrained(beside)
    return path
