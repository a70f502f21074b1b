"""A tiny FLUX.2 klein pipeline."""

import tiny_flux2
from diffusers import Flux2KleinPipeline
from family_cases import Case


def make() -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        scheduler=tiny_flux2.scheduler(), vae=tiny_flux2.vae(), text_encoder=tiny_flux2.qwen(),
        tokenizer=tiny_flux2.qwen_tokenizer(), transformer=tiny_flux2.transformer(guidance=False),
    )  # fmt: skip


CASE = Case("flux2_klein", make, {"guidance_scale": 1.0}, tiny_flux2.unpack, stored=tiny_flux2.stored)
