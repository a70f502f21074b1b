"""Stable Diffusion XL and the models fine-tuned from it: a UNet with two CLIP text encoders.

It is given the size of each image, the corner of its crop, and the size of the crop (Podell et al.
2023, section 2.2).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.comfy import ComfyConditioning, ComfyLayout, Conditioning, PooledLayout
from models.comfy_nodes import ComfyNodes
from models.families.trained_text_encoder import with_trained_text_encoders
from models.families.transformer_family import pooled_rows
from models.families.unet_family import UNetFamily, is_unet_file

CROP_FIELDS = [1, 0, 5, 4, 7, 6]
"""Fields of data.media.buckets.Crop in the order of SDXL's time ids: original size, corner of the
crop, size of the crop, each with the height first."""
COMFY_SIZES = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
"""ComfyUI's names of the time ids, in their order."""
REFINER_WIDTH = 1280
"""Width of the refiner's conditioning, from the second text encoder."""


class SizedLayout(PooledLayout):
    """ComfyUI's pooled conditioning with the sizes of the image."""

    def tensors(self, cond: Tensor, extras: dict[str, Any]) -> Conditioning:
        tensors = super().tensors(cond, extras)
        if "width" not in extras or "height" not in extras:
            return tensors  # then ComfyUI also uses the size of the latents
        sizes = {
            "crop_h": 0,
            "crop_w": 0,
            "target_height": extras["height"],
            "target_width": extras["width"],
            **extras,
        }
        time_ids = [int(sizes[name]) for name in COMFY_SIZES]
        tensors["time_ids"] = torch.tensor(time_ids, dtype=torch.int32)
        return tensors

    def conditioning(self, tensors: Conditioning) -> ComfyConditioning:
        cond, extras = super().conditioning(tensors)
        if "time_ids" in tensors:
            time_ids = tensors["time_ids"].tolist()
            for name, size in zip(COMFY_SIZES, time_ids, strict=True):
                extras[name] = int(size)
        return cond, extras


class StableDiffusionXL(UNetFamily):
    """Stable Diffusion XL and its descendants."""

    name = "sdxl"
    undistilled_model = "SDXL (stabilityai/stable-diffusion-xl-base-1.0)"
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
    )
    text_components = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    unused_components = ("feature_extractor", "image_encoder")
    file_prefixes: ClassVar = {
        **UNetFamily.file_prefixes,
        "text_encoder": ("conditioner.embedders.0.",),
        "text_encoder_2": ("conditioner.embedders.1.",),
    }
    latent_scale = 0.13025
    penultimate_encoders = ("text_encoder",)
    comfy_widths: ClassVar = {2048: "SDXL"}

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return is_unet_file(shapes, takes_sizes=True, paints_masks=False)

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        super().check_denoiser(config)
        if config.get("cross_attention_dim") == REFINER_WIDTH:
            raise ModelError(
                f"--model.path {self.config.path}: is SDXL's refiner, which has only the second "
                "text encoder and cannot be trained here. Use the base model"
            )
        if config.get("addition_embed_type") != "text_time":
            raise ModelError(
                f"--model.path {self.config.path}: is not of the family sdxl: its UNet takes no "
                "size conditioning. Remove --model.family"
            )

    @property
    def comfy_nodes(self) -> ComfyNodes:  # type: ignore[override]
        zeroes = self.files.pipeline_config.get("force_zeros_for_empty_prompt", True)
        return replace(UNetFamily.comfy_nodes, zeroes_missing_negative=zeroes)

    @property
    def pooled_width(self) -> int:
        config = self.denoiser_config
        time_width = len(CROP_FIELDS) * config["addition_time_embed_dim"]
        return config["projection_class_embeddings_input_dim"] - time_width

    @cached_property
    def comfy(self) -> ComfyLayout:
        return SizedLayout(self.cond_width, self.pooled_width, self.sample_conditioning)

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        embeds, _, pooled, _ = encoders.encode_prompt(
            captions,
            device=encoders._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return pooled_rows(embeds, pooled)

    def size_conditioning(self, crop: Tensor) -> dict[str, Tensor]:
        # indexing by a list would copy it to the device
        fields = [crop[:, field] for field in CROP_FIELDS]
        return {"time_ids": torch.stack(fields, 1)}

    def denoiser_arguments(self, cond: dict[str, Any]) -> dict[str, Any]:
        return {
            "encoder_hidden_states": cond["prompt_embeds"],
            "added_cond_kwargs": {
                "text_embeds": cond["pooled_prompt_embeds"],
                "time_ids": cond["time_ids"],
            },
        }

    def encode_tokens(self, encoders: Any, cond: dict[str, Any]) -> dict[str, Any]:
        first = encoders.text_encoder(cond["text_encoder"], output_hidden_states=True)
        second = encoders.text_encoder_2(cond["text_encoder_2"], output_hidden_states=True)
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {**cond, "prompt_embeds": embeds, "pooled_prompt_embeds": second[0]}

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return self.unet_metadata("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")


FAMILY = StableDiffusionXL
FAMILY_WITH_TEXT_ENCODERS = with_trained_text_encoders(StableDiffusionXL)
