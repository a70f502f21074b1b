"""Tiny FLUX.1 pipelines, as dev and as schnell."""

from functools import partial
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from helpers.family_cases import Case
from helpers.tiny_models import (
    CLIP_WIDTH,
    clip_encoder,
    clip_tokenizer,
    image_vae,
    t5_encoder,
    t5_tokenizer,
)

WIDTHS = {
    "in_channels": 64, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 32, "axes_dims_rope": (4, 2, 2),
}  # fmt: skip
VAE = {
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def make(guided: bool, input_channels: int = 64, **scheduler: object) -> FluxPipeline:
    widths = {**WIDTHS, "in_channels": input_channels, "out_channels": 64}
    return FluxPipeline(
        transformer=FluxTransformer2DModel(**widths, pooled_projection_dim=CLIP_WIDTH, guidance_embeds=guided),
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler), vae=image_vae(16, **VAE),
        text_encoder=clip_encoder(), tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def unpack(pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
    return pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)


def comfy(pipeline: Any, caption: str, tokens: int = 512) -> tuple[Tensor, dict[str, Any]]:
    """T5's tokens, as many as ComfyUI is told to fill them up to, and CLIP's pooled vector (text_encoders/flux.py)."""
    ids = pipeline.tokenizer_2(
        caption, padding="max_length", max_length=tokens, return_tensors="pt"
    ).input_ids
    pooled = pipeline.text_encoder(
        pipeline.tokenizer(caption, padding="max_length", return_tensors="pt").input_ids
    )
    return pipeline.text_encoder_2(ids)[0], {"pooled_output": pooled.pooler_output, "guidance": 3.5}


DEV = Case(
    "flux1", partial(make, guided=True, shift=3.0, use_dynamic_shifting=True), {"guidance_scale": 1.0}, unpack,
    comfy=comfy, name="flux1-dev",
)  # fmt: skip
SCHNELL = Case(
    "flux1", partial(make, guided=False), {"max_sequence_length": 256}, unpack, comfy=partial(comfy, tokens=256),
    name="flux1-schnell",
)  # fmt: skip
CASES = [DEV, SCHNELL]
