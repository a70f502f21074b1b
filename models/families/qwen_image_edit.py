"""Qwen-Image-Edit (Qwen team 2025, arXiv 2508.02324): Qwen-Image, given an image to edit.

The tokens of the control image follow those of the noisy image, and Qwen2.5-VL sees the control image
with the caption. The models of 2509 and 2511 are in qwen_image_edit_plus.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn

from models.base import base_metadata
from models.comfy import ComfyLayout, MaskedLayout
from models.controls import (
    ControlLimits,
    ControlSize,
    control_name,
    limited_area,
    rounded_down,
    whole_image,
)
from models.diffusers_family import ComponentLoaders
from models.families.qwen_image import TOKENS, QwenImage, rows_without_padding

CONTROL_PIXELS = 1024 * 1024
"""Area of a control image in the pipeline."""
SIDE_STEP = 32
"""Sides of a control image are multiples of this in the pipeline."""
MAX_CONTROL_RATIO = 200
"""Largest ratio of the sides, the limit of Qwen2-VL's processor."""
SCALES_OTHERWISE = "ComfyUI scales control images by another filter, to slightly other sizes."
PIXELS_PER_TOKEN = 28 * 28
"""Pixels of a token of Qwen2.5-VL."""


class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit. It always has one control image."""

    name = "qwen_image_edit"
    cuts_captions = False
    pipelines: ClassVar[tuple[str, ...]] = (
        "QwenImageEditPipeline",
        "QwenImageEditInpaintPipeline",
    )
    same_files_as = "qwen_image"
    text_components = ("text_encoder", "tokenizer", "processor")
    controls = ControlLimits(
        max_count=1, usual_count=1, is_required=True, is_seen_by_text_encoder=True
    )
    comfy_nodes = replace(
        QwenImage.comfy_nodes,
        text_image_node="TextEncodeQwenImageEdit",
        difference=f"{QwenImage.comfy_nodes.difference} {SCALES_OTHERWISE}",
    )
    seen_pixels: ClassVar[int] = CONTROL_PIXELS
    """Area of a control image that the text encoder sees."""

    def find_source(self) -> str:
        return "Qwen/Qwen-Image-Edit"

    @property
    def max_tokens(self) -> int:  # type: ignore[override]
        """Tokens of a usual caption and its images, for estimates: the pipeline cuts no caption."""
        image_tokens = self.seen_pixels // PIXELS_PER_TOKEN
        return TOKENS + self.controls.max_count * image_tokens

    def replacement_loaders(self) -> ComponentLoaders:
        return {"processor": self._load_processor}

    def _load_processor(self) -> Any:
        from models.image_text_processor import load_processor

        return load_processor(self.files, self.tokenizer)

    @cached_property
    def comfy(self) -> ComfyLayout:
        required = (control_name(0),)
        return MaskedLayout(self.cond_width, required=required, has_frame_axis=True)

    def control_error(self, width: int, height: int) -> str | None:
        if max(width / height, height / width) <= MAX_CONTROL_RATIO:
            return None
        return (
            f"a control image of {width}x{height}; Qwen2.5-VL takes one side at most "
            f"{MAX_CONTROL_RATIO} times the other"
        )

    def control_size(self, width: int, height: int, max_pixels: int | None) -> ControlSize:
        if max_pixels is None or max_pixels >= CONTROL_PIXELS:
            return whole_image(*size_of_area(CONTROL_PIXELS, width, height))
        scaled_width, scaled_height = limited_area(width, height, max_pixels)
        model_width = rounded_down(scaled_width, SIDE_STEP)
        model_height = rounded_down(scaled_height, SIDE_STEP)
        return whole_image(model_width, model_height)

    def encode_with_controls(
        self, encoders: Any, caption: str, images: list[Any]
    ) -> dict[str, Tensor]:
        seen_images = []
        for image in images:
            width, height = size_of_area(self.seen_pixels, *image.size)
            seen_images.append(encoders.image_processor.resize(image, height, width))
        embeds, mask = encoders.encode_prompt(
            prompt=[caption],
            image=self.prompt_images(seen_images),
            device=encoders._execution_device,
        )
        return rows_without_padding(embeds, mask)[0]

    def prompt_images(self, images: Sequence[Image.Image]) -> Any:
        """Return the images as the pipeline gives them to the text encoder."""
        return images[0]

    def control_options(self, images: list[Any], width: int, height: int) -> dict[str, Any]:
        return {"image": images[0]}

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        source = "https://github.com/QwenLM/Qwen-Image"
        return base_metadata("qwen_image", "Qwen-Image-Edit", source)


def size_of_area(area: int, width: int, height: int) -> tuple[int, int]:
    """Return width and height of about this area, in multiples of 32, as the pipelines scale images."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    return calculate_dimensions(area, width / height)


FAMILY = QwenImageEdit
