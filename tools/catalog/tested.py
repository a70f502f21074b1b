"""Texts about the tests of each family. tests/tools/test_catalog.py keeps them true."""

import diffusers

from models.base import ModelFamily

NOT_TESTED = "released weights, and GPUs"


def test_lines(family_class: type[ModelFamily]) -> list[str]:
    """Return what is tested of a family, a text for each kind of test."""
    pipeline = family_class.pipelines[0]
    return [
        f"tiny models of the real classes: predictions equal those of {pipeline} to 1e-5, samples are "
        "the pictures that it draws, and every algorithm is trained, exported and read back",
        f"names in adapter files: {family_class.name_check}",
        f"diffusers: {loader_text(pipeline)}",
    ]


def loader_text(pipeline: str) -> str:
    """Return what of diffusers loads an exported LoRA."""
    loads_adapters = hasattr(getattr(diffusers, pipeline), "load_lora_weights")
    loader = "the pipeline" if loads_adapters else "the denoiser, not the pipeline,"
    return f"{loader} loads the exported LoRA and computes the same"
