"""The size of the samples of a run, which its options decide."""

import math
from dataclasses import dataclass

from data.media.buckets import Buckets, Size
from models.base import ModelFamily
from training.config import TrainConfig

COLORS = 3


@dataclass(frozen=True)
class SampleShape:
    """Shapes of a sample: pixels (3, [F,] H, W) and latents (C, [F,] h, w)."""

    pixels: tuple[int, ...]
    latents: tuple[int, ...]


def largest_sample(config: TrainConfig, family: ModelFamily) -> SampleShape:
    """Return the shapes of the bucket with the most pixels."""
    step = family.limits.pixel_step
    only_square = not config.bucket_mode
    buckets = Buckets.of(config.data, step, only_square)
    sizes = buckets.all_sizes()
    size = max(sizes, key=math.prod)
    return sample_of_size(family, size, config.data.frames)


def sample_of_size(family: ModelFamily, size: Size, num_frames: int) -> SampleShape:
    """Return the shapes for a size in pixels."""
    limits = family.limits
    pixels = [size.height, size.width]
    latents = []
    for side in pixels:
        latents.append(side // limits.latent_step)
    if limits.is_video:
        latent_frames = 1 + (num_frames - 1) // limits.frame_step
        latents.insert(0, latent_frames)
        if num_frames > 1:
            pixels.insert(0, num_frames)
    channels = family.latent_channels
    return SampleShape(
        pixels=(COLORS, *pixels),
        latents=(channels, *latents),
    )
