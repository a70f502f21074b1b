"""Tiny Stable Diffusion 3 pipelines: as 3 medium and as 3.5 medium, and one without T5."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
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

T5_WIDTH = 48  # more than both CLIPs have


def make(with_t5: bool = True, **variant: object) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=T5_WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=24, **variant,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(projection=True), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(projection=True), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(T5_WIDTH) if with_t5 else None, tokenizer_3=t5_tokenizer() if with_t5 else None,
    )  # fmt: skip


def comfy(pipeline: Any, caption: str) -> tuple[Tensor, dict[str, Any]]:
    """cat(l, g) in T5's width, then T5's tokens; pooled l + g (comfy/text_encoders/sd3_clip.py)."""
    hidden, pooled = [], []
    for name in ("", "_2"):
        tokens = getattr(pipeline, f"tokenizer{name}")(
            caption, padding="max_length", return_tensors="pt"
        ).input_ids
        found = getattr(pipeline, f"text_encoder{name}")(tokens, output_hidden_states=True)
        hidden.append(found.hidden_states[-2])
        pooled.append(found.text_embeds)
    both = torch.cat(hidden, -1)
    cond = torch.zeros(1, both.shape[1], T5_WIDTH)
    cond[..., : both.shape[2]] = both
    tokens = pipeline.tokenizer_3(
        caption, padding="max_length", max_length=256, return_tensors="pt"
    ).input_ids
    return torch.cat([cond, pipeline.text_encoder_3(tokens)[0]], 1), {
        "pooled_output": torch.cat(pooled, -1)
    }


def bare(name: str) -> str:
    return name.replace("pos_embed.pos_embed", "pos_embed")


UNGUIDED = {"guidance_scale": 1.0}
CASES = [
    Case("sd3", make, UNGUIDED, comfy=comfy, bare=bare),
    Case(
        "sd3",
        partial(make, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
        UNGUIDED,
        name="sd3.5-medium",
        bare=bare,
    ),
    Case("sd3", partial(make, with_t5=False), UNGUIDED, name="sd3-without-t5"),
]
