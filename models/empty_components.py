"""Components of a pipeline that have shapes and no weights. Memory is planned with them.

They are made on the current device: on `meta`, or in a FakeTensorMode as tensors that have only a
shape, a dtype and a device.
"""

from typing import Any, Literal

import torch
from torch import nn

from common.dtypes import DTYPES
from models.diffusers_family import DiffusersFamily
from models.model_files import ENCODERS


def empty_encoders(family: DiffusersFamily, role: Literal["text", "media"]) -> Any:
    """Return the pipeline of `family.load_encoders` without weights, tokenizers and processors."""
    import diffusers

    names = family.text_components if role == "text" else family.components
    modules: dict[str, Any] = {}
    for name in names:
        if name in family.files.missing_components:
            continue
        is_text_encoder = name.startswith("text_encoder")
        if name.startswith(ENCODERS) and is_text_encoder == (role == "text"):
            modules[name] = family.files.empty_transformers_model(name)
            cast_weights(modules[name], family.files.component_dtype(name))
        if name == "vae":
            modules[name] = empty_vae(family)
    pipeline_class = getattr(diffusers, family.pipelines[0])
    absent_components = dict.fromkeys(family.all_components())
    arguments = {**absent_components, **modules}
    pipeline = pipeline_class(**arguments, **family.pipeline_options)
    if role == "text":
        family.trim_text_encoders(pipeline)
    return pipeline


def empty_vae(family: DiffusersFamily) -> nn.Module:
    """Return the VAE, with the tiles and in the dtype of the options."""
    import diffusers

    vae = getattr(diffusers, family.vae_class).from_config(family.vae_config)
    cast_weights(vae, DTYPES[family.config.vae_dtype])
    if family.config.vae_tiling:
        vae.enable_tiling()
    return vae.requires_grad_(False)


def empty_denoiser(family: DiffusersFamily, dtype: torch.dtype) -> nn.Module:
    """Return the denoiser as `family.load_denoiser` loads it, on the CPU."""
    return cast_weights(family.empty_denoiser("cpu"), dtype)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert the weights of a model, except those that diffusers and transformers keep in fp32.

    Module.to cannot convert tensors without values."""
    names: Any = getattr(model, "_keep_in_fp32_modules", None)
    if hasattr(model, "_keep_in_fp32_modules_strict"):  # transformers'; its other list is for fp16
        names = model._keep_in_fp32_modules_strict
    exact_parts = set(names or ())
    converted: dict[nn.Parameter, nn.Parameter] = {}  # modules may share a weight
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            parts = {*module_name.split("."), name}
            new_dtype = torch.float32 if parts & exact_parts else dtype
            if parameter not in converted:
                weight = parameter.detach().to(new_dtype)
                converted[parameter] = nn.Parameter(weight, requires_grad=False)
            module._parameters[name] = converted[parameter]
    return model
