"""Wan 2.1 and 2.2, image to video: the denoiser is told the first frame, in further channels of its
input and, in 2.1, by CLIP's view of it. The 5B, which is told it by a first frame without noise, is
trained as text to video (wan.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.base import with_frames
from models.checkpoint_files import files_read, part_folder
from models.families.wan import CLIP_VIEW, IMAGE_CHANNELS, OTHERS, PATCHES, WAN_NAMES, Wan

MASK_CHANNELS = 4  # of each latent frame, one for each frame that it is made of
VISION = ("image_encoder", "image_processor")


def encoders_of(parts: Any) -> Any:
    """The text encoders of diffusers' pipeline from images in one that does without the package
    ftfy."""
    from diffusers import WanPipeline

    return WanPipeline(parts.tokenizer, parts.text_encoder, vae=None, scheduler=None)


class WanImageToVideo(Wan):
    """Every video is its own first frame's."""

    name = "wan_i2v"
    pair = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
    pipelines = ("WanImageToVideoPipeline",)
    unused = ("transformer_2", *VISION)
    takes_image = True

    @classmethod
    def holds(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        if not shapes.keys() >= WAN_NAMES or shapes.keys() & {*OTHERS} - {CLIP_VIEW}:
            return False
        return CLIP_VIEW in shapes or IMAGE_CHANNELS in shapes[PATCHES][1:2]

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        wanted = 2 * config["out_channels"] + MASK_CHANNELS
        if config["in_channels"] != wanted:
            raise ModelError(
                f"--model.path {self.config.path} is no image-to-video model of this kind: its denoiser takes "
                f"{config['in_channels']} channels, not {wanted}"
            )

    def frames_fault(self, frames: int) -> str | None:
        if frames > 1:
            return super().frames_fault(frames)
        least = 1 + self.frame_step
        return f"the model is given the first frame, so one alone teaches it nothing; {least} are the fewest"

    @property
    def sees(self) -> bool:
        """Whether the denoiser is given CLIP's view of the first frame."""
        return self.denoiser_config.get("image_dim") is not None

    @property
    def media_cond(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("first_frame", "image_embeds") if self.sees else ("first_frame",)

    @property
    def components(self) -> tuple[str, ...]:
        return (*super().components, *(VISION if self.sees else ()))

    def load_encoders(self, what: Literal["text", "media"]) -> Any:
        if what == "media":
            return self._load("vae", *(VISION if self.sees else ()))
        return encoders_of(super().load_encoders(what))

    def pipeline(self, denoiser: nn.Module | None) -> Any:
        found = super().pipeline(denoiser)
        found.encode_prompt = encoders_of(found).encode_prompt
        return found

    def component_files(self, component: str) -> list[Path]:
        found = super().component_files(component)
        if component == "vae" and self.sees:
            with self._faults_told():
                folders = [part_folder(self.source, part) for part in VISION]
            found += [
                file for folder in folders for file in files_read(folder, self.config.variant)
            ]
        return found

    def encode_media_cond(self, encoders: Any, pixels: Tensor) -> dict[str, Tensor]:
        clip = with_frames(pixels, True)
        first = torch.cat([clip[:, :, :1], torch.zeros_like(clip[:, :, 1:])], 2)
        found = {"first_frame": self.encode_media(encoders, first)[0]}
        if self.sees:
            images = ((clip[:, :, 0] + 1) * 127.5).round().to(torch.uint8).cpu()
            inputs = encoders.image_processor(images=list(images), return_tensors="pt").to(
                pixels.device
            )
            seen = encoders.image_encoder(**inputs, output_hidden_states=True)
            found["image_embeds"] = seen.hidden_states[-2]
        return found

    def cond_from_comfy(self, cond: Tensor, extras: dict[str, Any]) -> dict[str, Tensor]:
        found = super().cond_from_comfy(cond, extras)
        if "concat_latent_image" in extras:
            found["first_frame"] = extras["concat_latent_image"][0]
        return found

    def cond_to_comfy(self, cond: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        embeds, extras = super().cond_to_comfy(cond)
        if "first_frame" in cond:
            extras["concat_latent_image"] = cond["first_frame"][None]
        return embeds, extras

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Tensor]
    ) -> Tensor:
        known = noisy.new_zeros(len(noisy), MASK_CHANNELS, *noisy.shape[2:])
        known[:, :, 0] = 1
        first = self.normalize(cond["first_frame"]).to(noisy.dtype)
        return denoiser(
            torch.cat([noisy, known, first], 1),
            timestep,
            cond["prompt_embeds"],
            encoder_hidden_states_image=cond.get("image_embeds"),
            return_dict=False,
        )[0]


FAMILY = WanImageToVideo
