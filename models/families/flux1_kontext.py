"""FLUX.1 Kontext (Black Forest Labs 2025, arXiv 2506.15742): FLUX.1 dev, given an image to edit.

The tokens of the control image follow those of the noisy image. They have other positions.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from models.base import base_metadata
from models.comfy_nodes import ComfyNodes
from models.controls import (
    ControlLimits,
    ControlSize,
    limited_area,
    rounded_down,
    whole_image,
)
from models.families.flux1 import Flux1


class Flux1Kontext(Flux1):
    """FLUX.1 Kontext. Samples without a control image are trained as text to image."""

    undistilled_model = ""
    name = "flux1_kontext"
    pipelines = ("FluxKontextPipeline", "FluxKontextInpaintPipeline")
    same_files_as = "flux1"
    controls = ControlLimits(max_count=1, usual_count=1)

    @property
    def comfy_nodes(self) -> ComfyNodes:  # type: ignore[override]
        return replace(
            super().comfy_nodes,
            control_scale="FluxKontextImageScale",
            difference="ComfyUI crops a control image to the nearest size of the model. The trainer's "
            "pipeline stretches it.",
        )

    def find_source(self) -> str:
        return "black-forest-labs/FLUX.1-Kontext-dev"

    def control_size(self, width: int, height: int, max_pixels: int | None) -> ControlSize:
        """Return the size of Kontext's own sizes with the nearest aspect ratio."""
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        ratio = width / height

        def distance(size: tuple[int, int]) -> float:
            own_width, own_height = size
            return abs(ratio - own_width / own_height)

        own_width, own_height = min(PREFERRED_KONTEXT_RESOLUTIONS, key=distance)
        scaled_width, scaled_height = limited_area(own_width, own_height, max_pixels)
        model_width = rounded_down(scaled_width, self.pixel_step)
        model_height = rounded_down(scaled_height, self.pixel_step)
        return whole_image(model_width, model_height)

    def control_options(self, images: list[Any], width: int, height: int) -> dict[str, Any]:
        options: dict[str, Any] = {}
        # without it, about 1024 x 1024 pixels are drawn
        options["max_area"] = width * height
        if images:
            (image,) = images
            options["image"] = image
        return options

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return base_metadata("flux1", "flux-1-kontext-dev")


FAMILY = Flux1Kontext
