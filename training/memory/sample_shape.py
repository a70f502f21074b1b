"""The size of the samples of a run, which its options decide."""

import math
from dataclasses import dataclass

import torch

from data.config import DataConfig, SourceConfig
from data.media.buckets import Buckets, Size
from data.precompute.encode import media_batch_size
from models.base import ModelFamily, TensorLayout
from models.controls import control_name, features_name
from training.config import TrainConfig

COLORS = 3
CONTROL_SIDE = 1024
"""Side in pixels of a control image for which memory is planned."""


@dataclass(frozen=True)
class SampleShape:
    """Shapes of a sample: pixels (3, [F,] H, W) and latents (C, [F,] h, w)."""

    pixels: tuple[int, ...]
    latents: tuple[int, ...]


def largest_sample(config: TrainConfig, family: ModelFamily) -> SampleShape:
    """Return the shapes of the bucket with the most pixels."""
    samples = all_samples(config, family)
    return max(samples, key=lambda sample: math.prod(sample.pixels))


def largest_encoded_sample(config: TrainConfig, family: ModelFamily) -> SampleShape:
    """Return the shapes of the bucket whose batches have the most pixels when they are encoded."""

    def num_pixels(sample: SampleShape) -> int:
        batch_size = media_batch_size(config.data, sample.pixels)
        return batch_size * math.prod(sample.pixels)

    samples = all_samples(config, family)
    return max(samples, key=num_pixels)


def all_samples(config: TrainConfig, family: ModelFamily) -> list[SampleShape]:
    """Return the shapes of all buckets."""
    step = family.limits.pixel_step
    only_square = not config.bucket_mode
    buckets = Buckets.of(config.data, step, only_square)
    samples = []
    for size in buckets.all_sizes():
        sample = sample_of_size(family, size, config.data.frames)
        samples.append(sample)
    return samples


def planned_controls(config: DataConfig, family: ModelFamily) -> int:
    """Return the number of a sample's control images: one for each folder or column.

    If the options name none, it is the usual number of the model."""
    counts = []
    sources: list[DataConfig | SourceConfig] = [config, *config.sources]
    for source in sources:
        for names in (source.control_paths, source.control_columns):
            counts.append(len(names or ()))
    count = max(counts) or family.controls.usual_count
    return min(count, family.controls.max_count)


def control_layout(config: DataConfig, family: ModelFamily) -> dict[str, TensorLayout]:
    """Return the tensors of a sample's control images, which are squares."""
    layout = {}
    for number in range(planned_controls(config, family)):
        size = family.control_size(CONTROL_SIDE, CONTROL_SIDE, config.control_pixels)
        sample = sample_of_size(family, Size(size.width, size.height), num_frames=1)
        layout[control_name(number)] = TensorLayout(sample.latents, torch.float32)
        features = family.features_layout()
        if features is not None:
            layout[features_name(number)] = features
    return layout


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
