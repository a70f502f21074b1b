"""Qwen-Image-Edit 2509 and 2511 ("Plus", Qwen team 2025): Qwen-Image, given one or several images.

The text encoder sees smaller images than the denoiser, and their numbers.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from models.comfy_nodes import ComfyNodes
from models.controls import ControlLimits
from models.families.qwen_image_edit import QwenImageEdit

SEEN_PIXELS = 384 * 384


class QwenImageEditPlus(QwenImageEdit):
    """Qwen-Image-Edit with up to three control images, for which it was made."""

    name = "qwen_image_edit_plus"
    pipelines = ("QwenImageEditPlusPipeline",)
    controls = ControlLimits(
        max_count=3, usual_count=1, is_required=True, is_seen_by_text_encoder=True
    )
    seen_pixels = SEEN_PIXELS

    @property
    def comfy_nodes(self) -> ComfyNodes:  # type: ignore[override]
        gives_no_noise = self.denoiser_config.get("zero_cond_t", False)  # to control images
        return replace(
            super().comfy_nodes,
            text_image_node="TextEncodeQwenImageEditPlus",
            reference_method="index_timestep_zero" if gives_no_noise else "",
        )

    def find_source(self) -> str:
        return "Qwen/Qwen-Image-Edit-2509"

    def prompt_images(self, images: Sequence[Image.Image]) -> Any:
        return [*images]

    def control_options(self, images: list[Any], width: int, height: int) -> dict[str, Any]:
        return {"image": [*images]}


FAMILY = QwenImageEditPlus
