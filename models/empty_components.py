"""Components of a pipeline that have shapes and no weights. Memory is planned with them.

They are made on the current device: on `meta`, or in a FakeTensorMode as tensors that have only a
shape, a dtype and a device.
"""

from typing import Any, Literal

import torch
from torch import nn

from common.dtypes import DTYPES
from models.diffusers_family import DiffusersFamily
from models.layer_loading import names_in_fp32, use_formats_of_file
from models.model_files import MIN_LARGE, is_encoder


def empty_encoders(family: DiffusersFamily, role: Literal["text", "media"]) -> Any:
    """Return the pipeline of `family.load_encoders` without weights, tokenizers and processors."""
    modules: dict[str, Any] = dict.fromkeys(family.all_components()) | family.stand_ins()
    if role == "text":
        names = family.text_components
    else:
        names = family.components
        modules["vae"] = empty_vae(family)
    for name in names:
        is_of_role = (name in family.text_components) == (role == "text")
        is_missing = name in family.files.missing_components
        if is_encoder(name) and is_of_role and not is_missing:
            modules[name] = empty_encoder(family, name)
    pipeline = family.make_pipeline(modules)
    if role == "text":
        family.trim_text_encoders(pipeline)
    return pipeline


def empty_encoder(family: DiffusersFamily, component: str) -> nn.Module:
    """Return an encoder of the pipeline in the dtype and formats in which it is loaded."""
    files = family.files
    encoder = files.empty_encoder(component)
    encoder = cast_weights(encoder, files.component_dtype(component))
    if component in files.quantized_encoders:
        from models.quantized_encoders import quantize_encoder

        quantize_encoder(encoder, family.config.text_encoder_quantization)
    elif component in files.text_encoder_files:
        use_formats_of_file(encoder, files.text_encoder_files[component])
    return encoder


def empty_vae(family: DiffusersFamily) -> nn.Module:
    """Return the VAE, with the tiles and in the dtype of the options."""
    import diffusers

    vae = getattr(diffusers, family.vae_class).from_config(family.vae_config)
    cast_weights(vae, DTYPES[family.config.vae_dtype])
    if family.config.vae_tiling:
        vae.enable_tiling()
    return vae.requires_grad_(False)


def empty_other_denoisers(family: DiffusersFamily) -> list[nn.Module]:
    """Return the denoisers that draw besides the trained one, in the dtype in which they are loaded."""
    import diffusers

    denoisers = []
    for component in family.other_denoisers:
        config = family.component_config(component)
        denoiser_class = getattr(diffusers, config["_class_name"])
        denoiser = denoiser_class.from_config(config)
        count = sum(parameter.numel() for parameter in denoiser.parameters())
        dtype = torch.bfloat16 if count > MIN_LARGE else torch.float32
        denoisers.append(cast_weights(denoiser, dtype))
    return denoisers


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert the weights of a model, except those that diffusers and transformers keep in fp32.

    Module.to cannot convert tensors without values."""
    exact_names = names_in_fp32(model)
    converted: dict[nn.Parameter, nn.Parameter] = {}  # modules may share a weight
    for module_name, module in model.named_modules():
        parameters: dict[str, Any] = module._parameters
        for name, parameter in parameters.items():
            if parameter is None:
                continue
            if parameter not in converted:
                path = {*module_name.split("."), name}
                is_exact = bool(path & exact_names)
                new_dtype = torch.float32 if is_exact else dtype
                weight = parameter.detach().to(new_dtype)
                converted[parameter] = nn.Parameter(weight, requires_grad=False)
            parameters[name] = converted[parameter]
        for name, buffer in module._buffers.items():
            is_stored = name not in module._non_persistent_buffers_set
            if buffer is not None and is_stored and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    return model
