"""A tiny FLUX.1 Fill pipeline."""

from diffusers import FluxFillPipeline

from helpers.families import flux1
from helpers.families.sd15_inpaint import MASKED
from helpers.family_cases import Case

INPUT_CHANNELS = 4 * (16 + 16 + 4 * 4)
"""Of a cell: noisy latents, masked image, and the pixels of the mask under a latent."""


def make() -> FluxFillPipeline:
    pipeline = flux1.make(
        guided=True, shift=3.0, use_dynamic_shifting=True, input_channels=INPUT_CHANNELS
    )
    unused = ("image_encoder", "feature_extractor")
    parts = {name: part for name, part in pipeline.components.items() if name not in unused}
    return FluxFillPipeline(**parts)


CASE = Case("flux1_fill", make, {"guidance_scale": 1.0}, flux1.unpack, **MASKED)
