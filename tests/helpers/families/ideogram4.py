"""A tiny Ideogram 4 pipeline, whose text encoder has all 36 layers: the pipeline looks into the last one."""

import copy
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
)
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS
from torch import Tensor
from transformers import Qwen2Tokenizer

from helpers.families import tiny_flux2
from helpers.families.tiny_qwen import CHAT, qwen3_vl, qwen_tokenizer
from helpers.family_cases import Case

WIDTH = 8
NUM_STATES = len(QWEN3_VL_ACTIVATION_LAYERS)


def tokenizer() -> Qwen2Tokenizer:
    """Its template takes a message of several parts, as that of Qwen3-VL."""
    found = copy.deepcopy(qwen_tokenizer())
    found.chat_template = CHAT.replace("message.content", "message.content[0].text")
    return found


def transformer() -> Ideogram4Transformer2DModel:
    return Ideogram4Transformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=48, adaln_dim=16,
        llm_features_dim=NUM_STATES * WIDTH, mrope_section=(4, 2, 2),
    )  # fmt: skip


def make() -> Ideogram4Pipeline:
    text_encoder = qwen3_vl(hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=36)
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny_flux2.vae(levels=4), text_encoder=text_encoder,
        tokenizer=tokenizer(), transformer=transformer(), unconditional_transformer=transformer(),
    )  # fmt: skip


def unpack(pipeline: Any, tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents (B, C, h, w) from the pipeline's (B, h w, 4 latents of a cell, channels)."""
    cells = tokens.unflatten(2, (4, -1)).transpose(2, 3).flatten(2)
    return cells.transpose(1, 2).unflatten(2, (height // 16, width // 16))


def stored(pipeline: Any, latents: Tensor) -> Tensor:
    """What the pipeline denoises of the latents that it decodes, by the statistics of its tokens."""
    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    rows = latents.unflatten(3, (width, 2)).unflatten(2, (height, 2))
    tokens = rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    spread = (pipeline.vae.bn.running_var + pipeline.vae.config.batch_norm_eps).sqrt()
    tokens = (tokens - pipeline.vae.bn.running_mean) / spread
    return unpack(pipeline, tokens, 16 * height, 16 * width)


def comfy(pipeline: Any, caption: str) -> tuple[Tensor, dict[str, Any]]:
    """Outputs of the layers, interleaved (comfy/text_encoders/ideogram4.py)."""
    text = f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"
    ids = pipeline.tokenizer(text, return_tensors="pt").input_ids
    layers = pipeline.text_encoder.language_model.layers
    states: list[Tensor] = []
    hooks = [
        layers[i].register_forward_hook(lambda *event: states.append(event[2]))
        for i in QWEN3_VL_ACTIVATION_LAYERS
    ]
    pipeline.text_encoder(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(states, -1).flatten(2), {"pooled_output": None}


CASE = Case(
    "ideogram4",
    make,
    {"guidance_scale": 1.0, "guidance_schedule": None, "max_sequence_length": 32},
    unpack,
    comfy,
    stored,
)
