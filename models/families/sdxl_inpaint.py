"""SDXL Inpainting: it paints the part of an image that a mask shows."""

from collections.abc import Mapping
from typing import Any

from models.families.inpainting import InpaintingUNet
from models.families.sdxl import StableDiffusionXL
from models.families.unet_family import is_unet_file


class StableDiffusionXLInpainting(InpaintingUNet, StableDiffusionXL):
    """SDXL with nine input channels."""

    undistilled_model = ""
    name = "sdxl_inpaint"
    pipelines = ("StableDiffusionXLInpaintPipeline",)
    comfy_nodes = None  # type: ignore[assignment]

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return is_unet_file(shapes, takes_sizes=True, paints_masks=True)

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        # the pipeline's own strength keeps a trace of the image under the mask
        return {**super().preview_options(guidance_scale), "strength": 1.0}


FAMILY = StableDiffusionXLInpainting
