"""Families that the embedded model makes of itself: captions without padding, and videos."""

from functools import cached_property
from typing import Any

from torch import Tensor, nn

from models.comfy import ComfyConditioning, ComfyLayout, Conditioning
from models.families.sd15 import StableDiffusion


class VariableLength(StableDiffusion):
    """The real text encoder's tokens up to the end of the caption; the UNet does not see what is padded."""

    variable_length = {"prompt_embeds": None}  # noqa: RUF012

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        counts, most = self.count_tokens(captions)
        conds = super().encode_prompt(encoders, captions)
        return [
            {"prompt_embeds": c["prompt_embeds"][: min(n, most) + 2]}
            for c, n in zip(conds, counts, strict=True)
        ]

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Tensor]
    ) -> Tensor:
        embeds, mask = cond["prompt_embeds"], cond["attention_mask"]
        return denoiser(noisy, timestep, embeds, encoder_attention_mask=mask, return_dict=False)[0]


class FirstFrameLayout(ComfyLayout):
    """ComfyUI's conditioning with the latents of the first frame."""

    def tensors(self, cond: Tensor, extras: dict[str, Any]) -> Conditioning:
        tensors = super().tensors(cond, extras)
        if "concat_latent_image" in extras:
            tensors["first_frame"] = extras["concat_latent_image"][0, :, 0]
        return tensors

    def conditioning(self, tensors: Conditioning) -> ComfyConditioning:
        cond, extras = super().conditioning(tensors)
        return cond, extras | {"concat_latent_image": tensors["first_frame"][None, :, None]}


class Video(StableDiffusion):
    """Each latent frame is that of the first of four frames; the first frame's latents condition the others."""

    media = "video"
    frame_step = 4
    sample_conditioning = ("first_frame",)

    def encode_media(self, encoders: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        frames = (pixels if pixels.ndim == 5 else pixels.unsqueeze(2))[:, :, ::4]
        mean, deviation = super().encode_media(encoders, frames.transpose(1, 2).flatten(0, 1))
        mean, deviation = (
            of.unflatten(0, (len(pixels), -1)).transpose(1, 2) for of in (mean, deviation)
        )
        return mean, deviation

    def encode_sample_conditioning(
        self, encoders: Any, pixels: Tensor, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        first = pixels if pixels.ndim == 4 else pixels[:, :, 0]
        return {"first_frame": super().encode_media(encoders, first)[0]}

    def decode_media(self, encoders: Any, latents: Tensor) -> Tensor:
        frames = super().decode_media(encoders, latents.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (len(latents), -1)).transpose(1, 2)

    @cached_property
    def comfy(self) -> ComfyLayout:
        return FirstFrameLayout(
            self.cond_width, required=self.sample_conditioning, has_frame_axis=True
        )

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Tensor]
    ) -> Tensor:
        count = noisy.shape[2]
        frames = (noisy + cond["first_frame"].unsqueeze(2)).transpose(1, 2).flatten(0, 1)
        embeds = {"prompt_embeds": cond["prompt_embeds"].repeat_interleave(count, 0)}
        predicted = super().predict(denoiser, frames, timestep.repeat_interleave(count), embeds)
        return predicted.unflatten(0, (len(noisy), -1)).transpose(1, 2)


FAMILY = Video
