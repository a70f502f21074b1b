"""Limits: the sizes of images and videos that a model takes."""

import math
from dataclasses import dataclass

PAINTED = 0.5
"""Pixels with at least this value in a mask are painted, as in diffusers' pipelines."""


@dataclass(frozen=True)
class Limits:
    """Sizes of images and videos that a model takes."""

    latent_step: int
    """Pixels per latent, along height and width."""
    pixel_step: int
    """Height and width of an image in pixels must be multiples of this."""
    patch_size: int
    """Latents per image token of the denoiser, along height and width."""
    is_video: bool = False
    frame_step: int = 1
    """Videos have 1 + n times this many frames, and their latents 1 + n."""
    fps: float = 16.0
    """Frames per second of the videos that the base model was trained on."""
    allows_images: bool = True
    """False if one frame alone teaches the model nothing, because it is given the first frame."""

    def frame_error(self, num_frames: int) -> str | None:
        """WHEN: in precompute. OUT: an error if the model cannot be trained on so many frames."""
        if num_frames > 1 and not self.is_video:
            return "this model makes images"
        if num_frames == 1 and not self.allows_images:
            return (
                "the model is given the first frame, so one frame alone teaches it nothing; "
                f"expected at least {1 + self.frame_step} frames"
            )
        return None

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """WHEN: in the loop, because the noise levels of some families depend on the image size.

        IN: shape of the latents (B, C, [F,] h, w). OUT: image tokens of each sample."""
        return math.prod(shape[2:]) // self.patch_size**2
