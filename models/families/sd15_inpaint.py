"""Stable Diffusion 1.5 and 2 Inpainting: they paint the part of an image that a mask shows."""

from collections.abc import Mapping

from models.families.inpainting import InpaintingUNet
from models.families.sd15 import StableDiffusion
from models.families.unet_family import is_unet_file


class StableDiffusionInpainting(InpaintingUNet, StableDiffusion):
    """Stable Diffusion 1.5 and 2 with nine input channels."""

    name = "sd15_inpaint"
    pipelines = ("StableDiffusionInpaintPipeline",)
    comfy_nodes = None  # type: ignore[assignment]

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return is_unet_file(shapes, takes_sizes=False, paints_masks=True)


FAMILY = StableDiffusionInpainting
