"""Qwen-Image-Edit 2509 and 2511 ("Plus", Qwen team 2025): Qwen-Image, given one or several images.

The text encoder sees smaller images than the denoiser, and their numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from common.errors import ModelError
from models.comfy_nodes import ComfyNodes
from models.controls import ControlLimits
from models.families.qwen_image_edit import QwenImageEdit

SEEN_PIXELS = 384 * 384
MARKER_2511 = "__index_timestep_zero__"


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

    @property
    def is_marked_2511(self) -> bool:
        """True for a single file with the tensor by which ComfyUI knows the model of 2511."""
        return any(name.endswith(MARKER_2511) for name in self.files.shapes)

    def find_source(self) -> str:
        version = "2511" if self.is_marked_2511 else "2509"
        return f"Qwen/Qwen-Image-Edit-{version}"

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        super().check_denoiser(config)
        is_file = self.files.is_single_file
        if is_file and self.is_marked_2511 and not config.get("zero_cond_t", False):
            raise ModelError(
                f"--model.config {self.config.config}: is not the configuration of "
                f"Qwen-Image-Edit-2511, but {self.config.path} is a file of that model. Use "
                "Qwen/Qwen-Image-Edit-2511"
            )

    def prompt_images(self, images: Sequence[Image.Image]) -> Any:
        return [*images]

    def control_options(self, images: list[Any], width: int, height: int) -> dict[str, Any]:
        return {"image": [*images]}


FAMILY = QwenImageEditPlus
