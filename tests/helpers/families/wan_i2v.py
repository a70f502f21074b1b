"""Tiny Wan pipelines of image to video: 2.1's, which sees the first frame by CLIP too, and 2.2's."""

from functools import partial
from types import MethodType
from typing import Any

from diffusers import WanImageToVideoPipeline, WanPipeline
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from helpers.families.wan import CALL, WIDTH, bare, scheduler, transformer
from helpers.family_cases import Case
from helpers.tiny_models import t5_tokenizer, umt5_encoder, wan_vae

SEEN = 16  # width of what CLIP sees


def make(sees: bool) -> WanImageToVideoPipeline:
    vision: dict[str, Any] = {"image_encoder": None, "image_processor": None}
    of_denoiser: dict[str, Any] = {}
    if sees:
        config = CLIPVisionConfig(
            hidden_size=SEEN, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, image_size=32,
            patch_size=8,
        )  # fmt: skip
        size = {"height": 32, "width": 32}
        vision = {
            "image_encoder": CLIPVisionModel(config).eval(),
            "image_processor": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size),
        }
        of_denoiser = {"image_dim": SEEN, "added_kv_proj_dim": 24}
    return WanImageToVideoPipeline(
        tokenizer=t5_tokenizer(), text_encoder=umt5_encoder(WIDTH), vae=wan_vae(), **vision, scheduler=scheduler(),
        transformer=transformer(16, 36, **of_denoiser),
        **{} if sees else {"transformer_2": transformer(16, 36), "boundary_ratio": 0.9},
    )  # fmt: skip


def repair(pipeline: Any) -> None:
    """It uses ftfy where there is none; the other pipeline, which has the same code, does not."""
    pipeline._get_t5_prompt_embeds = MethodType(WanPipeline._get_t5_prompt_embeds, pipeline)


OF_BOTH: dict[str, Any] = {"bare": bare, "first_frame": True, "repair": repair}
CASES = [
    Case("wan_i2v", partial(make, True), CALL, name="wan2.1-i2v", **OF_BOTH),
    Case("wan_i2v", partial(make, False), CALL, name="wan2.2-i2v", **OF_BOTH),
]
