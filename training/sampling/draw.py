"""Drawing of one sample by diffusers' own pipeline."""

import gc
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.precision import without_autocast
from models.base import ModelFamily
from models.encoder_placement import modules_of
from training.sampling.prompts import SamplePrompt


def pipeline_options(
    family: ModelFamily,
    pipeline: Any,
    prompt: SamplePrompt,
    controls: Sequence[Image.Image] = (),
) -> dict[str, Any]:
    """Return the arguments of the pipeline's call for a completed prompt and its control images.

    A pipeline whose call takes no guidance scale is given it here."""
    assert prompt.guidance_scale is not None  # it is completed
    assert prompt.width is not None
    assert prompt.height is not None
    family.set_guidance(pipeline, prompt.guidance_scale)
    options: dict[str, Any] = {
        # by name: it is not the first argument of every pipeline
        "prompt": prompt.text,
        "height": prompt.height,
        "width": prompt.width,
        "num_inference_steps": prompt.num_inference_steps,
        **family.preview_options(prompt.guidance_scale),
        **family.prompt_options(prompt.text),
    }
    if family.controls.max_count:
        options |= family.control_options([*controls], prompt.width, prompt.height)
    if prompt.negative is not None and uses_negative_prompt(type(pipeline), options):
        options["negative_prompt"] = prompt.negative
    return options


def uses_negative_prompt(pipeline_class: Any, options: dict[str, Any]) -> bool:
    """Return whether a call of a pipeline uses a negative prompt.

    Guidance-distilled models do not, unless they are given a second scale."""
    parameters = call_parameters(pipeline_class)
    needs_scale = "true_cfg_scale" in parameters and "true_cfg_scale" not in options
    return "negative_prompt" in parameters and not needs_scale


def call_parameters(pipeline_class: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a call of a pipeline."""
    return inspect.signature(pipeline_class.__call__).parameters


def draw_sample(pipeline: Any, prompt: SamplePrompt, options: dict[str, Any]) -> np.ndarray:
    """Draw one image or video (F, H, W, 3) in [0, 1].

    `options`: the arguments of the pipeline's call, without the noise."""
    assert prompt.seed is not None  # it is completed
    with uses_bf16_modules(pipeline), vae_in_own_dtype(pipeline.vae):
        result = pipeline(
            generator=torch.Generator().manual_seed(prompt.seed),
            output_type="np",
            **options,
        )
    if hasattr(result, "images"):
        return over_white(result.images)
    return result.frames[0]


def over_white(images: np.ndarray) -> np.ndarray:
    """Return images (F, H, W, 3) on white, of images that may have transparency as a fourth channel."""
    colors = images[..., :3]
    opacity = images[..., 3:]
    if not opacity.size:
        return colors
    return colors * opacity + (1 - opacity)


@contextmanager
def vae_in_own_dtype(vae: Any) -> Iterator[None]:
    """Let a VAE encode and decode in the dtype of its weights in a block: bf16 autocast would band
    colors."""

    def in_own_dtype(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
            with without_autocast(inputs.device.type):
                return function(inputs.to(vae.dtype), *args, **kwargs)

        return call

    vae.encode, vae.decode = in_own_dtype(vae.encode), in_own_dtype(vae.decode)
    try:
        yield
    finally:
        del vae.encode, vae.decode


def uses_bf16_modules(pipeline: Any) -> AbstractContextManager:
    """Return autocast, for a block in which modules in bf16 get inputs from others in fp32."""
    is_bf16 = any(has_bf16_weights(module) for module in modules_of(pipeline))
    return torch.autocast(pipeline._execution_device.type, torch.bfloat16, enabled=is_bf16)


def has_bf16_weights(module: nn.Module) -> bool:
    """Return whether a module has weights in bf16."""
    return any(parameter.dtype is torch.bfloat16 for parameter in module.parameters())


def free_memory(device: torch.device) -> None:
    """Free modules that refer to themselves in a circle, and give unused memory back to the GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
