"""A tiny FLUX.2 dev pipeline."""

from dataclasses import replace

from diffusers import Flux2Pipeline

from helpers.families import tiny_flux2
from helpers.family_cases import Case


def make() -> Flux2Pipeline:
    return Flux2Pipeline(
        scheduler=tiny_flux2.scheduler(), vae=tiny_flux2.vae(), text_encoder=tiny_flux2.mistral(),
        tokenizer=tiny_flux2.mistral_tokenizer(), transformer=tiny_flux2.transformer(guidance=True),
    )  # fmt: skip


PLAIN = Case("flux2", make, {"guidance_scale": 1.0}, tiny_flux2.unpack, stored=tiny_flux2.stored)
EDIT = replace(PLAIN, name="flux2-edit", comfy=None, controls=2)
CASES = [PLAIN]  # EDIT: tests/models/test_edit_models.py
