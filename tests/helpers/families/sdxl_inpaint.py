"""A tiny SDXL Inpainting pipeline."""

from diffusers import StableDiffusionXLInpaintPipeline

from helpers.families import sdxl
from helpers.families.sd15_inpaint import MASKED
from helpers.family_cases import Case


def make() -> StableDiffusionXLInpaintPipeline:
    parts = sdxl.make(input_channels=9).components
    return StableDiffusionXLInpaintPipeline(**parts)


CASE = Case("sdxl_inpaint", make, {"guidance_scale": 1.0, "strength": 1.0}, **MASKED)
