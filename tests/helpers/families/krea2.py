"""A tiny Krea 2 pipeline."""

import re
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)
from torch import Tensor

from helpers.families.tiny_qwen import WIDTH, qwen3_vl, qwen_tokenizer, states
from helpers.family_cases import Case

LAYERS = (1, 2, 3)


def make(is_distilled: bool = False) -> Krea2Pipeline:
    transformer = Krea2Transformer2DModel(
        in_channels=64, num_layers=2, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, timestep_embed_dim=32, text_hidden_dim=WIDTH, num_text_layers=len(LAYERS),
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=24,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=6400, max_shift=1.15, use_dynamic_shifting=True,
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True]
    )
    return Krea2Pipeline(
        scheduler=scheduler, vae=vae.eval(), text_encoder=qwen3_vl(), tokenizer=qwen_tokenizer(),
        transformer=transformer, text_encoder_select_layers=LAYERS, is_distilled=is_distilled,
    )  # fmt: skip


def unpack(pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
    return pipeline._unpack_latents(latents, height, width).squeeze(2)


def comfy(pipeline: Any, caption: str) -> tuple[Tensor, dict[str, Any]]:
    """States of several layers in a row, without the template before the caption (comfy/text_encoders/krea2.py)."""
    before, after = (
        pipeline.prompt_template_encode_prefix,
        pipeline.prompt_template_encode_suffix,
    )
    all_states = states(pipeline, before + caption + after)
    stacked = torch.stack([all_states[layer] for layer in LAYERS], 2)
    num_before = len(pipeline.tokenizer(before).input_ids)
    return stacked[:, num_before:].flatten(2), {"pooled_output": None}


def bare(name: str) -> str:
    if name.startswith("final_layer"):
        return "last.modulation.lin"
    return re.sub(r"transformer_blocks\.(\d+)\.scale_shift_table", r"blocks.\1.mod.lin", name)


CALL = {"guidance_scale": 0.0}
CASES = [
    Case("krea2", make, CALL, unpack, comfy, bare=bare),
    Case("krea2", partial(make, True), CALL, unpack, comfy, name="krea2-turbo", bare=bare),
]
