"""Qwen-Image (Qwen team 2025, arXiv 2508.02324): a transformer over tokens of text and image.

Its text encoder is Qwen2.5-VL.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.base import base_metadata
from models.comfy import ComfyLayout, MaskedLayout
from models.comfy_nodes import ComfyNodes
from models.encoder_placement import keep_first_layers
from models.families.packing import PATCH, pack, unpack
from models.families.qwen_vae import QwenVaeFamily
from models.families.transformer_family import ATTENTION
from models.layer_names.tables import TableNames

TOKENS = 1024
"""The pipeline's limit, with the tokens of the template after the caption."""
AFTER_CAPTION = "<|im_end|>\n<|im_start|>assistant\n"
"""The part of the pipeline's template after the caption."""


class QwenImage(QwenVaeFamily):
    """Conditioning is the encoder's last state, without the template in front of the caption."""

    name = "qwen_image"
    pipelines: ClassVar[tuple[str, ...]] = (
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
    )
    denoiser_class = "QwenImageTransformer2DModel"
    layer_names = TableNames()  # all names are the same
    variable_length: ClassVar = {"prompt_embeds": None}
    max_tokens = TOKENS
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|.*\.(img|txt)_mlp\.net\.(0\.proj|2)",
        "all": r".*",
    }
    comfy_widths: ClassVar = {3584: "Qwen-Image"}
    comfy_nodes = ComfyNodes(
        text_encoders=("qwen_2.5_vl_7b.safetensors",),
        text_encoder_type="qwen_image",
        vae="qwen_image_vae.safetensors",
        shift="ModelSamplingAuraFlow",
        difference="The trainer's pipeline scales the guided prediction to the length of the unguided "
        "one. ComfyUI does not: use a lower cfg there.",
    )

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return {"txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"} <= shapes.keys()

    def find_source(self) -> str:
        return "Qwen/Qwen-Image"  # diffusers would detect the file as Stable Diffusion 1

    @cached_property
    def comfy(self) -> ComfyLayout:
        return MaskedLayout(self.cond_width, has_frame_axis=True)

    def num_template_tokens(self) -> int:
        return super().num_template_tokens() + len(self.tokenizer(AFTER_CAPTION).input_ids)

    def trim_text_encoders(self, pipeline: Any) -> None:
        num_layers = pipeline.text_encoder.config.text_config.num_hidden_layers
        has_images = self.controls.is_seen_by_text_encoder
        keep_first_layers(pipeline.text_encoder, num_layers, has_images)

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        embeds, mask = encoders.encode_prompt(
            captions,
            device=encoders._execution_device,
            max_sequence_length=TOKENS,
        )
        return rows_without_padding(embeds, mask)

    def idle_layers(self, denoiser: nn.Module) -> list[str]:
        """Return the last block's layers for the text, which nothing reads."""
        blocks: Any = denoiser.transformer_blocks
        last_number = len(blocks) - 1
        last_block = f"transformer_blocks.{last_number}"
        return [
            f"{last_block}.attn.to_add_out",
            f"{last_block}.txt_mlp",
        ]

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        tokens = []
        shapes = []
        for latents in self.with_controls(noisy, cond):
            tokens.append(pack(latents))
            rows, columns = latents.shape[2] // PATCH, latents.shape[3] // PATCH
            shapes.append((1, rows, columns))
        # without a mask attention is faster, and nothing is copied to the device
        has_padding = len(set(cond["lengths"])) > 1
        predicted = denoiser(
            hidden_states=torch.cat(tokens, 1),
            timestep=timestep / 1000,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_hidden_states_mask=cond["attention_mask"] if has_padding else None,
            img_shapes=[shapes] * len(noisy),
            return_dict=False,
        )[0]
        num_tokens = self.limits.num_tokens(noisy.shape)
        return unpack(predicted[:, :num_tokens], height, width)

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        return {
            "true_cfg_scale": guidance_scale,
            "negative_prompt": " ",  # without one the pipeline ignores the scale
            "max_sequence_length": TOKENS,
        }

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return base_metadata("qwen_image", "Qwen-Image", "https://github.com/QwenLM/Qwen-Image")


def rows_without_padding(embeds: Tensor, mask: Tensor | None) -> list[dict[str, Tensor]]:
    """Return encode_prompt's result for tokens (B, L, D) and their mask. None: there is no padding."""
    if mask is None:
        return [{"prompt_embeds": embed.clone()} for embed in embeds]
    rows = []
    for embed, count in zip(embeds, mask.sum(1).tolist(), strict=True):
        caption = embed[:count].clone()
        rows.append({"prompt_embeds": caption})
    return rows


FAMILY = QwenImage
