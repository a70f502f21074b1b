"""Stable Diffusion 1.x and 2.x: a UNet with one CLIP text encoder; epsilon or v-prediction."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.base import check_comfy_cond
from models.families.unet_family import UNetFamily


class StableDiffusion(UNetFamily):
    name = "sd15"
    pipelines = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
    unused = ("safety_checker", "feature_extractor", "image_encoder")
    in_file: ClassVar = {**UNetFamily.in_file, "text_encoder": ("cond_stage_model.",)}
    pipeline_options: ClassVar = {"requires_safety_checker": False}
    latent_scale = 0.18215
    kohya_is_native = False

    @classmethod
    def holds(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return "input_blocks.0.0.weight" in shapes and "label_emb.0.0.weight" not in shapes

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        super().check_denoiser(config)
        if config.get("addition_embed_type") is not None:
            raise ModelError(
                f"--model.path {self.config.path} is not of the family sd15: its UNet wants size conditioning"
            )

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        embeds, _ = encoders.encode_prompt(captions, encoders.text_encoder.device, 1, False)
        return [{"prompt_embeds": embed} for embed in embeds]

    def cond_bytes(self) -> int:
        return self.counting_tokenizer.model_max_length * self.cond_width * torch.float32.itemsize

    def cond_from_comfy(self, cond: Tensor, extras: dict[str, Any]) -> dict[str, Tensor]:
        check_comfy_cond(cond, self.cond_width)
        return {"prompt_embeds": cond[0]}  # several chunks of 77 tokens in a row are as good as one

    def cond_to_comfy(self, cond: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        return cond["prompt_embeds"][None], {"pooled_output": None}

    def inputs(self, cond: dict[str, Tensor]) -> dict[str, Any]:
        return {"encoder_hidden_states": cond["prompt_embeds"]}

    def embedded(self, encoders: Any, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**cond, "prompt_embeds": encoders.text_encoder(cond["text_encoder"])[0]}

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        second = denoiser.config.cross_attention_dim == 1024  # type: ignore[union-attr]
        v_prediction = self.prediction_type == "v_prediction"
        version = "sd_v2" if second else "sd_v1"
        architecture = "stable-diffusion-v1"
        if second:
            architecture = (
                "stable-diffusion-v2-768-v" if v_prediction else "stable-diffusion-v2-512"
            )
        versioned = f"{version}_v" if v_prediction else version
        return {**self.unet_metadata(versioned, architecture), "ss_v2": str(second)}


FAMILY = StableDiffusion
