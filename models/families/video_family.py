"""Families of models that make videos: an image is a video of one frame."""

from typing import Any, ClassVar

from torch import Tensor

from models.families.transformer_family import TransformerFamily
from models.latents import with_frame_axis


class VideoFamily(TransformerFamily):
    """A transformer over latents of a VAE for videos."""

    media = "video"
    file_prefixes: ClassVar = {}

    def encode_media(self, encoders: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return super().encode_media(encoders, with_frame_axis(pixels, True))

    def decode_media(self, encoders: Any, latents: Tensor) -> Tensor:
        pixels = super().decode_media(encoders, latents)
        num_frames = latents.shape[2]
        return with_frame_axis(pixels, num_frames > 1)
