"""A tiny Z-Image pipeline."""

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor

from helpers.families.tiny_qwen import WIDTH, qwen3, qwen_tokenizer, states
from helpers.family_cases import Case
from helpers.tiny_models import image_vae


def make() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[8, 8, 8],
        axes_lens=[1024, 64, 64],
    )  # fmt: skip
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=qwen3(), tokenizer=qwen_tokenizer(),
        vae=image_vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        transformer=transformer,
    )  # fmt: skip


def comfy(pipeline: Any, caption: str) -> tuple[Tensor, dict[str, Any]]:
    """The last state but one, of all tokens (comfy/text_encoders/z_image.py)."""
    text = f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"
    return states(pipeline, text)[-2], {"pooled_output": None}


CASE = Case("z_image", make, {"guidance_scale": 0.0}, comfy=comfy)
