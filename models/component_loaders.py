"""Loaders of the components of a pipeline that do not come from a diffusers folder as they are."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.dtypes import DTYPES
from common.errors import ModelError
from models.checkpoint_files import config_path, read_config
from models.model_files import ModelFiles
from models.quiet import hide_load_report
from models.text_encoder_files import load_encoder

ComponentLoaders = dict[str, Callable[[], Any]]
"""Component of a pipeline -> function that loads it."""


def load_vae(files: ModelFiles, class_name: str, path: str) -> nn.Module:
    """Load a VAE of a diffusers class, in fp32, from a file or a folder."""
    import diffusers

    vae_class = getattr(diffusers, class_name)
    is_option = path == files.config.vae
    subject = f"--model.vae {path}: " if is_option else ""
    with files.loading_errors(subject):
        if Path(path).is_dir():
            is_pipeline = (Path(path) / "vae").is_dir()
            subfolder = "vae" if is_pipeline else None
            return vae_class.from_pretrained(path, subfolder=subfolder, dtype=torch.float32)
        if not hasattr(vae_class, "from_single_file"):
            raise ModelError(
                f"--model.vae {path}: diffusers reads no files of {class_name}. Use a folder"
            )
        return vae_class.from_single_file(
            path, dtype=torch.float32, config=files.source, subfolder="vae"
        )


def vae_file_config(path: str) -> dict[str, Any]:
    """Return the configuration in a VAE's folder; {} for a file, which has none."""
    for folder in (Path(path) / "vae", Path(path)):
        if (folder / "config.json").is_file():
            return read_config(str(folder), "config.json")
    return {}


def check_fp16(vae_config: Mapping[str, Any]) -> None:
    """Raise ModelError if a VAE overflows in fp16, as its configuration says.

    `vae_config`: the values in its file, to which diffusers' classes add defaults."""
    if vae_config.get("force_upcast", False):
        raise ModelError(
            "--model.vae_dtype fp16: this VAE overflows in fp16, as its config says "
            "(force_upcast). Use bf16 or fp32"
        )


def set_vae_dtype(vae: nn.Module, dtype: str) -> None:
    """Convert the parts of a VAE that encode and decode."""
    for name, module in vae.named_children():
        if name != "bn":  # statistics of the latents, which stay exact
            module.to(DTYPES[dtype])


def encoder_loaders(
    files: ModelFiles,
    pipeline_name: str,
    all_components: Iterable[str],
    options: Mapping[str, Any],
) -> ComponentLoaders:
    """Return the loaders of encoders that do not come from the source as they are.

    `all_components`: of the pipeline. `options`: arguments of the pipeline."""
    loaders: ComponentLoaders = {}
    for component in files.quantized_encoders:
        loaders[component] = partial(load_quantized_encoder, files, component)
    for component in files.contained_components:
        loaders[component] = partial(
            load_contained_component, files, pipeline_name, component, all_components, options
        )
    for component in files.text_encoder_files:
        loaders[component] = partial(load_text_encoder, files, component)
    return loaders


def load_text_encoder(files: ModelFiles, component: str) -> nn.Module:
    """Load a text encoder from a file of --model.text_encoders."""
    file = files.text_encoder_files[component]
    class_name = files.pipeline_config[component][1]
    with files.loading_errors(f"--model.text_encoders {file}: "):
        config_folder = config_path(files.source, f"{component}/config.json").parent
        layers = files.encoder_format(component)
        return load_encoder(
            file, class_name, config_folder, files.component_dtype(component), layers
        )


def load_quantized_encoder(files: ModelFiles, component: str) -> nn.Module:
    """Load a text encoder of the source, and quantize each weight when it was read."""
    import transformers

    from models.quantized_encoders import EncoderQuantization

    encoder_class = getattr(transformers, files.pipeline_config[component][1])
    layers = files.encoder_format(component)
    with files.loading_errors(), hide_load_report():
        return encoder_class.from_pretrained(
            files.source,
            subfolder=component,
            dtype=files.component_dtype(component),
            quantization_config=EncoderQuantization(layers),
            **files.load_options,
        )


def load_contained_component(
    files: ModelFiles,
    pipeline_name: str,
    component: str,
    all_components: Iterable[str],
    options: Mapping[str, Any],
) -> nn.Module:
    """Load a component of a single file by diffusers' converter for its pipeline.

    `all_components`: of the pipeline. `options`: arguments of the pipeline."""
    import diffusers

    pipeline_class = getattr(diffusers, pipeline_name)
    other_components = dict.fromkeys({*all_components} - {component})
    pipeline = pipeline_class.from_single_file(
        str(files.path),
        config=files.source,
        dtype=files.component_dtype(component),
        **other_components,
        **options,
    )
    module = getattr(pipeline, component)
    if component in files.quantized_encoders:
        from models.quantized_encoders import quantize_encoder

        quantize_encoder(module, files.config.text_encoder_quantization)
    return module
