"""A tiny Qwen-Image 2.1 pipeline."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from torch import Tensor

from helpers.families.tiny_qwen import WIDTH, image_text_processor, qwen3_vl
from helpers.family_cases import Case

CHANNELS = 64
SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"


def make() -> QwenImage21Pipeline:
    transformer = QwenImage21Transformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=WIDTH, mlp_ratio=2,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02,
        use_dynamic_shifting=True,
    )  # fmt: skip
    vae = AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1
    )
    return QwenImage21Pipeline(
        scheduler=scheduler, vae=vae.eval(), text_encoder=qwen3_vl(has_images=True),
        processor=image_text_processor("Qwen3VLProcessor"), transformer=transformer,
    )  # fmt: skip


def unpack(pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
    return pipeline._unpack_latents(latents, height, width, 16).squeeze(2)


def comfy(pipeline: Any, caption: str) -> tuple[Tensor, dict[str, Any]]:
    """The last state before the norm, without the system's message (comfy/text_encoders/qwen_image21.py)."""
    text = f"{SYSTEM}<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = pipeline.processor.tokenizer
    tokens = tokenizer(text, return_tensors="pt").input_ids
    states: list[Tensor] = []
    norm = pipeline.text_encoder.model.language_model.norm
    hook = norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    with torch.no_grad():
        pipeline.text_encoder(tokens)
    hook.remove()
    (state,) = states
    return state[:, len(tokenizer(SYSTEM).input_ids) :], {"pooled_output": None}


# its pipeline places an image behind the longest prompt of the batch
CASE = Case("qwen_image_21", make, {"true_cfg_scale": 1.0}, unpack, comfy, alone=True)
