"""A tiny HunyuanVideo 1.5 pipeline."""

from inspect import signature
from typing import Any

from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from torch import Tensor
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
)

from helpers.families.tiny_qwen import SEEN, TEXT, VISION_ROPE, WIDTH, qwen_tokenizer, states
from helpers.family_cases import Case

CHANNELS = 4
GLYPH_WIDTH = 12
TEMPLATE_TOKENS = 108
"""Tokens before a caption, which the pipeline cuts off."""
MESSAGE = (
    signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters["system_message"].default
)


def transformer(**more: Any) -> HunyuanVideo15Transformer3DModel:
    return HunyuanVideo15Transformer3DModel(
        in_channels=2 * CHANNELS + 1, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=WIDTH, text_embed_2_dim=GLYPH_WIDTH, image_embed_dim=8,
        rope_axes_dim=(4, 6, 6), **more,
    )  # fmt: skip


def components() -> dict[str, Any]:
    """The components of text to video and of image to video."""
    tokenizer = qwen_tokenizer(template=f"{MESSAGE}\n{SEEN}")
    config = Qwen2_5_VLTextConfig(
        **TEXT, vocab_size=len(tokenizer), rope_parameters=VISION_ROPE, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    glyph_tokenizer = ByT5Tokenizer()
    glyph_config = T5Config(
        vocab_size=len(glyph_tokenizer), d_model=GLYPH_WIDTH, d_kv=8, d_ff=16, num_heads=2, num_layers=1,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=CHANNELS, block_out_channels=(2 * CHANNELS,) * 5, layers_per_block=1
    )
    return {
        "text_encoder": Qwen2_5_VLTextModel(config).eval(), "tokenizer": tokenizer,
        "text_encoder_2": T5EncoderModel(glyph_config).eval(), "tokenizer_2": glyph_tokenizer,
        "vae": vae.eval(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "guider": ClassifierFreeGuidance(guidance_scale=1.0),
    }  # fmt: skip


def make() -> HunyuanVideo15Pipeline:
    return HunyuanVideo15Pipeline(transformer=transformer(task_type="t2v"), **components())


def repair(pipeline: Any) -> None:
    """The attention of its VAE fails for batches of several."""
    pipeline.vae.enable_slicing()


def comfy(pipeline: Any, caption: str) -> tuple[Tensor, dict[str, Any]]:
    """The state before the last two, without the template before the caption (comfy/text_encoders/hunyuan_image.py).

    The template is the pipeline's."""
    text = f"<|im_start|>system\n{MESSAGE}<|im_end|>\n<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"
    return states(pipeline, text)[-3][:, TEMPLATE_TOKENS:], {"pooled_output": None}


CASE = Case("hunyuan_video15", make, {"num_frames": 5}, comfy=comfy, repair=repair)
