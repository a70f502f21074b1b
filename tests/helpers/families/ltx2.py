"""Tiny LTX-2 and LTX-2.3 pipelines."""

import re
from functools import lru_cache, partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GemmaTokenizer

from helpers.family_cases import Case
from helpers.tiny_models import WORDS

WIDTH = 8  # of the text encoder
VIDEO_WIDTH, AUDIO_WIDTH = 64, 32
CHANNELS = 128
LAYERS = 2  # of the text encoder
CELL = 32  # pixels per latent


@lru_cache
def gemma_tokenizer() -> GemmaTokenizer:
    empty = GemmaTokenizer(model_max_length=2048, add_bos_token=True)
    texts = [*(f" {word}" for word in WORDS), "abcdefghijklmnopqrstuvwxyz"]
    return empty.train_new_from_iterator(texts, 200, show_progress=False)


def gemma3() -> Gemma3ForConditionalGeneration:
    text = {
        "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "vocab_size": len(gemma_tokenizer()), "sliding_window": 512,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config).eval()


def video_vae() -> AutoencoderKLLTX2Video:
    """As the released one it makes cells of 32 pixels and 8 frames."""
    vae = AutoencoderKLLTX2Video(
        latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1), decoder_causal=False,
        decoder_spatial_padding_mode="zeros", spatial_compression_ratio=CELL, temporal_compression_ratio=8,
    )  # fmt: skip
    vae.latents_mean.copy_(torch.linspace(-1, 1, CHANNELS))
    vae.latents_std.copy_(torch.linspace(0.5, 2, CHANNELS))
    return vae.eval()


def transformer(is_23: bool) -> LTX2VideoTransformer3DModel:
    more: dict[str, Any] = {}
    if is_23:
        more = {
            "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True,
            "use_prompt_embeddings": False, "perturbed_attn": True,
        }  # fmt: skip
    return LTX2VideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=VIDEO_WIDTH // 2, cross_attention_dim=VIDEO_WIDTH,
        audio_num_attention_heads=2, audio_attention_head_dim=AUDIO_WIDTH // 2,
        audio_cross_attention_dim=AUDIO_WIDTH, audio_in_channels=8, audio_out_channels=8, num_layers=2,
        caption_channels=WIDTH, rope_type="split", **more,
    )  # fmt: skip


def connectors(is_23: bool) -> LTX2TextConnectors:
    video_width, audio_width = (VIDEO_WIDTH, AUDIO_WIDTH) if is_23 else (WIDTH, WIDTH)
    return LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=LAYERS + 1, rope_type="split",
        video_connector_num_attention_heads=2, video_connector_attention_head_dim=video_width // 2,
        video_connector_num_layers=1, video_gated_attn=is_23,
        audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=audio_width // 2,
        audio_connector_num_layers=1, audio_gated_attn=is_23,
        per_modality_projections=is_23, video_hidden_dim=VIDEO_WIDTH, audio_hidden_dim=AUDIO_WIDTH, proj_bias=is_23,
    )  # fmt: skip


def make(is_23: bool) -> LTX2Pipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
        shift_terminal=0.1,
    )  # fmt: skip
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=8,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=16,
    )
    vocoder = LTX2Vocoder(
        in_channels=32, hidden_channels=8, upsample_kernel_sizes=[4], upsample_factors=[2], resnet_kernel_sizes=[3],
        resnet_dilations=[[1]],
    )  # fmt: skip
    return LTX2Pipeline(
        scheduler=scheduler, vae=video_vae(), audio_vae=audio_vae.eval(), text_encoder=gemma3(),
        tokenizer=gemma_tokenizer(), connectors=connectors(is_23), transformer=transformer(is_23), vocoder=vocoder,
    )  # fmt: skip


def unpack(pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
    rows, columns = height // CELL, width // CELL
    num_frames = latents.shape[1] // (rows * columns)
    return pipeline._unpack_latents(latents, num_frames, rows, columns)


def stored(pipeline: Any, latents: Tensor) -> Tensor:
    vae = pipeline.vae
    return pipeline._normalize_latents(
        latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    )


def bare(name: str) -> str:
    return re.sub(
        r"(video|audio)_a2v_cross_attn_scale_shift_table", r"scale_shift_table_a2v_ca_\1", name
    )


CALL = {
    "guidance_scale": 1.0, "audio_guidance_scale": 1.0, "stg_scale": 0.0, "audio_stg_scale": 0.0,
    "guidance_rescale": 0.0, "audio_guidance_rescale": 0.0, "num_frames": 9,
    # the video's prediction is the one without audio: v + (0 - 1) (v - isolated)
    "modality_scale": 0.0, "audio_modality_scale": 2.0,
}  # fmt: skip
CASES = [
    Case("ltx2", partial(make, False), CALL, unpack, stored=stored, bare=bare),
    Case("ltx2", partial(make, True), CALL, unpack, stored=stored, bare=bare, name="ltx2.3"),
]
