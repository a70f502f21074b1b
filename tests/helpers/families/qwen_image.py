"""A tiny Qwen-Image pipeline."""

from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor

from helpers.families.tiny_qwen import WIDTH, qwen25_vl, qwen_tokenizer, states
from helpers.family_cases import Case


def make(**options: object) -> QwenImagePipeline:
    """`options`: of the transformer."""
    transformer = QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        **options,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=8192, max_shift=0.9, shift=1.0, shift_terminal=0.02,
        use_dynamic_shifting=True,
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True]
    )
    return QwenImagePipeline(
        scheduler=scheduler, vae=vae.eval(), text_encoder=qwen25_vl(), tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )  # fmt: skip


def unpack(pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
    return pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor).squeeze(2)


def comfy(pipeline: Any, caption: str) -> tuple[Tensor, dict[str, Any]]:
    """The last state from behind the mark of the second message on (comfy/text_encoders/qwen_image.py)."""
    whole = states(pipeline, pipeline.prompt_template_encode.format(caption))[-1]
    before = pipeline.prompt_template_encode.partition("{}")[0]
    return whole[:, len(pipeline.tokenizer(before).input_ids) :], {"pooled_output": None}


CASE = Case("qwen_image", make, {"true_cfg_scale": 1.0}, unpack, comfy)
