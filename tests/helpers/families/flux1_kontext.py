"""A tiny FLUX.1 Kontext pipeline."""

from diffusers import FluxKontextPipeline

from helpers.families import flux1
from helpers.family_cases import Case
from helpers.small_controls import shrink

shrink()


def make() -> FluxKontextPipeline:
    plain = flux1.make(guided=True, shift=3.0, use_dynamic_shifting=True)
    return FluxKontextPipeline(**{name: part for name, part in plain.components.items() if part})


CASE = Case("flux1_kontext", make, {"guidance_scale": 1.0}, flux1.unpack, controls=1)
