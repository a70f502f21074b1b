"""A tiny Qwen-Image-Edit-2509 pipeline."""

from functools import partial

from diffusers import QwenImageEditPlusPipeline

from helpers.families import qwen_image, qwen_image_edit
from helpers.family_cases import Case

CASE = Case(
    "qwen_image_edit_plus", partial(qwen_image_edit.make, QwenImageEditPlusPipeline), qwen_image_edit.CALL,
    qwen_image.unpack, controls=2,
)  # fmt: skip
