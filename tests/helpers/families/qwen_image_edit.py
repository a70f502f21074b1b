"""A tiny Qwen-Image-Edit pipeline."""

from typing import Any

from diffusers import QwenImageEditPipeline

from helpers.families import qwen_image
from helpers.families.tiny_qwen import image_text_processor, qwen25_vl, qwen_tokenizer
from helpers.family_cases import Case
from helpers.small_controls import shrink

shrink()

CALL = {"true_cfg_scale": 1.0}


def make(pipeline_class: Any = QwenImageEditPipeline, **options: object) -> Any:
    """`options`: of the transformer."""
    plain = qwen_image.make(**options)
    return pipeline_class(
        scheduler=plain.scheduler, vae=plain.vae, transformer=plain.transformer,
        text_encoder=qwen25_vl(has_images=True), tokenizer=qwen_tokenizer(has_images=True),
        processor=image_text_processor(),
    )  # fmt: skip


CASE = Case("qwen_image_edit", make, CALL, qwen_image.unpack, controls=1)
