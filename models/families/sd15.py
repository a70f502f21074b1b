"""Stable Diffusion 1.x and 2.x: a UNet with one CLIP text encoder; epsilon or v-prediction."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from common.errors import ModelError
from models.families.trained_text_encoder import with_trained_text_encoders
from models.families.unet_family import SD2_WIDTH, UNetFamily, is_unet_file
from models.layer_names.unet import UNetNames


class StableDiffusion(UNetFamily):
    """Stable Diffusion 1.x and 2.x."""

    name = "sd15"
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
    )
    unused_components = ("safety_checker", "feature_extractor", "image_encoder")
    file_prefixes: ClassVar = {**UNetFamily.file_prefixes, "text_encoder": ("cond_stage_model.",)}
    pipeline_options: ClassVar = {"requires_safety_checker": False}
    latent_scale = 0.18215
    layer_names = UNetNames(kohya_uses_original_names=False)
    comfy_widths: ClassVar = {768: "SD1.5", SD2_WIDTH: "SD2.1"}

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return is_unet_file(shapes, takes_sizes=False, paints_masks=False)

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        super().check_denoiser(config)
        if config.get("addition_embed_type") is not None:
            raise ModelError(
                f"--model.path {self.config.path}: is not of the family sd15: its UNet takes size "
                "conditioning. Remove --model.family"
            )

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        device = encoders._execution_device
        embeds, _ = encoders.encode_prompt(
            captions, device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return [{"prompt_embeds": embed} for embed in embeds]

    def denoiser_arguments(self, cond: dict[str, Any]) -> dict[str, Any]:
        return {"encoder_hidden_states": cond["prompt_embeds"]}

    def encode_tokens(self, encoders: Any, cond: dict[str, Any]) -> dict[str, Any]:
        embeds = encoders.text_encoder(cond["text_encoder"])[0]
        return {**cond, "prompt_embeds": embeds}

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        config: Any = denoiser.config
        predicts_v = self.prediction_type == "v_prediction"
        if config.cross_attention_dim != SD2_WIDTH:
            version = "sd_v1"
            architecture = "stable-diffusion-v1"
        elif predicts_v:
            version = "sd_v2"
            architecture = "stable-diffusion-v2-768-v"
        else:
            version = "sd_v2"
            architecture = "stable-diffusion-v2-512"
        if predicts_v:
            version += "_v"
        metadata = self.unet_metadata(version, architecture)
        return {**metadata, "ss_v2": str(version.startswith("sd_v2"))}


FAMILY = StableDiffusion
FAMILY_WITH_TEXT_ENCODERS = with_trained_text_encoders(StableDiffusion)
