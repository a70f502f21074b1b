"""Families with Qwen-Image's VAE, which is for videos: an image is a video of one frame."""

from typing import Any, ClassVar

from torch import Tensor

from models.base import TokenCounts
from models.families.transformer_family import TransformerFamily
from models.latents import with_frame_axis


class QwenVaeFamily(TransformerFamily):
    """A transformer over latents of Qwen-Image's VAE, without a frame axis."""

    vae_class = "AutoencoderKLQwenImage"
    file_prefixes: ClassVar = {}
    cuts_captions: ClassVar[bool] = True
    """False if the pipeline cuts no caption: then the tokenizer alone limits its length."""

    @property
    def latent_step(self) -> int:
        return 2 ** len(self.vae_config["temperal_downsample"])  # diffusers' spelling

    def count_tokens(self, captions: list[str]) -> TokenCounts:
        if self.cuts_captions:
            return super().count_tokens(captions)
        return TokenCounts.of_captions(
            self.tokenizer,
            captions,
            self.tokenizer.model_max_length,
        )

    def encode_media(self, encoders: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = super().encode_media(encoders, with_frame_axis(pixels, True))
        return with_frame_axis(mean, False), with_frame_axis(deviation, False)

    def decode_media(self, encoders: Any, latents: Tensor) -> Tensor:
        pixels = super().decode_media(encoders, with_frame_axis(latents, True))
        return with_frame_axis(pixels, False)
