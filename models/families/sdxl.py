"""Stable Diffusion XL and what was fine-tuned from it: a UNet with two CLIP text encoders, which is
told the size of each image, where it was cropped and to what size (Podell et al. 2023, section
2.2).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.base import check_comfy_cond
from models.families.transformer_family import comfy_pooled, pooled_rows
from models.families.unet_family import UNetFamily

# of data.buckets.Crop, in the order of SDXL's time ids: original size, corner of the crop, target
# size, height first
TIME_IDS = [1, 0, 5, 4, 7, 6]
REFINER_WIDTH = 1280  # of its conditioning: the second text encoder's
COMFY_SIZES = (
    "height",
    "width",
    "crop_h",
    "crop_w",
    "target_height",
    "target_width",
)  # in the same order


class StableDiffusionXL(UNetFamily):
    name = "sdxl"
    pipelines = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
    text = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    unused = ("feature_extractor", "image_encoder")
    in_file: ClassVar = {
        **UNetFamily.in_file,
        "text_encoder": ("conditioner.embedders.0.",),
        "text_encoder_2": ("conditioner.embedders.1.",),
    }
    latent_scale = 0.13025
    read_before_last = ("text_encoder",)
    kohya_is_native = True

    @classmethod
    def holds(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return {"input_blocks.0.0.weight", "label_emb.0.0.weight"} <= shapes.keys()

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        super().check_denoiser(config)
        if config.get("cross_attention_dim") == REFINER_WIDTH:
            raise ModelError(
                f"--model.path {self.config.path} is SDXL's refiner, which has the second text encoder alone and is "
                "not trained here: give the base model"
            )
        if config.get("addition_embed_type") != "text_time":
            raise ModelError(
                f"--model.path {self.config.path} is not of the family sdxl: its UNet takes no size conditioning"
            )

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        device = encoders.text_encoder_2.device
        embeds, _, pooled, _ = encoders.encode_prompt(captions, None, device, 1, False)
        return pooled_rows(embeds, pooled)

    @property
    def _pooled_width(self) -> int:
        config = self.denoiser_config
        return (
            config["projection_class_embeddings_input_dim"]
            - len(TIME_IDS) * config["addition_time_embed_dim"]
        )

    def cond_bytes(self) -> int:
        values = self.counting_tokenizer.model_max_length * self.cond_width + self._pooled_width
        return values * torch.float32.itemsize

    def size_cond(self, crop: Tensor) -> dict[str, Tensor]:
        return {
            "time_ids": torch.stack([crop[:, field] for field in TIME_IDS], 1)
        }  # an index would be copied there

    def cond_from_comfy(self, cond: Tensor, extras: dict[str, Any]) -> dict[str, Tensor]:
        check_comfy_cond(cond, self.cond_width)
        found = {
            "prompt_embeds": cond[0],
            "pooled_prompt_embeds": comfy_pooled(extras, self._pooled_width),
        }
        if (
            "width" in extras and "height" in extras
        ):  # else ComfyUI too takes the size of the latents
            sizes = {
                "crop_h": 0,
                "crop_w": 0,
                "target_height": extras["height"],
                "target_width": extras["width"],
                **extras,
            }
            found["time_ids"] = torch.tensor(
                [int(sizes[name]) for name in COMFY_SIZES], dtype=torch.int32
            )
        return found

    def cond_to_comfy(self, cond: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        sizes = (
            dict(zip(COMFY_SIZES, cond["time_ids"].tolist(), strict=True))
            if "time_ids" in cond
            else {}
        )
        extras = {
            "pooled_output": cond["pooled_prompt_embeds"][None],
            **{name: int(size) for name, size in sizes.items()},
        }
        return cond["prompt_embeds"][None], extras

    def inputs(self, cond: dict[str, Tensor]) -> dict[str, Any]:
        added = {"text_embeds": cond["pooled_prompt_embeds"], "time_ids": cond["time_ids"]}
        return {"encoder_hidden_states": cond["prompt_embeds"], "added_cond_kwargs": added}

    def embedded(self, encoders: Any, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        first = encoders.text_encoder(cond["text_encoder"], output_hidden_states=True)
        second = encoders.text_encoder_2(cond["text_encoder_2"], output_hidden_states=True)
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {**cond, "prompt_embeds": embeds, "pooled_prompt_embeds": second[0]}

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return self.unet_metadata("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")


FAMILY = StableDiffusionXL
