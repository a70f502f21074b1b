"""A tiny FLUX.2 klein pipeline."""

from dataclasses import replace

import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor

from helpers.families import tiny_flux2
from helpers.family_cases import Case


def make() -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        scheduler=tiny_flux2.scheduler(), vae=tiny_flux2.vae(), text_encoder=tiny_flux2.qwen(),
        tokenizer=tiny_flux2.qwen_tokenizer(), transformer=tiny_flux2.transformer(guidance=False),
    )  # fmt: skip


def comfy(pipeline: Flux2KleinPipeline, caption: str) -> tuple[Tensor, dict]:
    """ComfyUI's tokenizer too pads to 512 tokens on the right, and its encoder hides the padding from the caption."""
    return pipeline.encode_prompt(caption)[0], {
        "pooled_output": None,
        "attention_mask": torch.ones(1, 512),
    }


PLAIN = Case(
    "flux2_klein", make, {"guidance_scale": 1.0}, tiny_flux2.unpack, comfy, stored=tiny_flux2.stored
)
EDIT = replace(PLAIN, name="flux2_klein-edit", comfy=None, controls=2)
CASES = [PLAIN]  # EDIT: tests/models/test_edit_models.py
