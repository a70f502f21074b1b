"""A tiny Z-Image omni pipeline."""

from dataclasses import replace
from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    ZImageOmniPipeline,
    ZImageTransformer2DModel,
)
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from helpers.families import z_image
from helpers.families.tiny_qwen import WIDTH, qwen3, qwen_tokenizer
from helpers.family_cases import Case
from helpers.tiny_models import image_vae

FEATURES = 12
PATCHES = 16


def make() -> ZImageOmniPipeline:
    transformer = ZImageTransformer2DModel(
        dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[8, 8, 8],
        axes_lens=[1024, 64, 64], siglip_feat_dim=FEATURES,
    )  # fmt: skip
    vision = Siglip2VisionConfig(
        hidden_size=FEATURES, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_patches=PATCHES,
    )  # fmt: skip
    return ZImageOmniPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=qwen3(has_images=True),
        vae=image_vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        tokenizer=qwen_tokenizer(has_images=True), transformer=transformer, siglip=Siglip2VisionModel(vision).eval(),
        siglip_processor=Siglip2ImageProcessorPil(max_num_patches=PATCHES),
    )  # fmt: skip


def take_bf16(pipeline: Any) -> None:
    """Let the VAE encode control images, which the pipeline rounds to bf16 whatever the VAE's dtype is."""
    encode = pipeline.vae.encode
    pipeline.vae.encode = lambda pixels: encode(pixels.to(pipeline.vae.dtype))


PLAIN = Case("z_image_omni", make, {"guidance_scale": 0.0}, comfy=z_image.comfy)
EDIT = replace(PLAIN, name="z_image_omni-edit", comfy=None, controls=2, repair=take_bf16)
CASES = [PLAIN, EDIT]
