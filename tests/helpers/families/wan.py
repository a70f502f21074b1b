"""Tiny Wan pipelines: 2.1's, the two denoisers of 2.2's A14B, and 2.2's 5B."""

from functools import partial
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from helpers.family_cases import Case
from helpers.tiny_models import t5_tokenizer, umt5_encoder, wan_vae

WIDTH = 24
CHANNELS = 48  # of the 5B's latents


def transformer(channels: int = 16, seen: int | None = None, **more: Any) -> WanTransformer3DModel:
    """Of latents of `channels`; its input has `seen`."""
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=seen or channels, out_channels=channels,
        text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32, **more,
    )  # fmt: skip


def scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )


def make(vae: dict[str, Any] | None = None, channels: int = 16, **options: Any) -> WanPipeline:
    return WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=umt5_encoder(WIDTH), vae=wan_vae(**vae or {}),
        transformer=transformer(channels), scheduler=scheduler(), **options,
    )  # fmt: skip


def make_pair() -> WanPipeline:
    return make(transformer_2=transformer(), boundary_ratio=0.875)


OF_5B = {
    "z_dim": CHANNELS, "dim_mult": [1, 1, 1, 1], "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "is_residual": True, "scale_factor_spatial": 16, "latents_mean": [i / CHANNELS for i in range(CHANNELS)],
    "latents_std": [0.5 + i / CHANNELS for i in range(CHANNELS)],
}  # fmt: skip


def comfy(pipeline: Any, caption: str) -> tuple[Tensor, dict[str, Any]]:
    """umT5's tokens in a row of 512, zeros after the caption (comfy/text_encoders/wan.py)."""
    tokens = pipeline.tokenizer(caption, return_tensors="pt").input_ids
    cond = torch.zeros(1, 512, WIDTH)
    cond[:, : tokens.shape[1]] = pipeline.text_encoder(tokens).last_hidden_state
    return cond, {"pooled_output": None}


def bare(name: str) -> str:
    return name.replace("scale_shift_table", "modulation" if "." in name else "head.modulation")


CALL = {"guidance_scale": 1.0, "num_frames": 5}
CASES = [
    Case("wan", make, CALL, comfy=comfy, bare=bare),
    Case("wan", make_pair, CALL, name="wan2.2-high", bare=bare),
    Case(
        "wan",
        make_pair,
        CALL,
        name="wan2.2-low",
        options=("--model.expert=low",),
        model={"expert": "low"},
        step=1,
        bare=bare,
    ),
    Case(
        "wan",
        partial(make, OF_5B, CHANNELS, expand_timesteps=True),
        CALL,
        name="wan2.2-5b",
        bare=bare,
    ),
]
