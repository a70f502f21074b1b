"""Small images of samples, as training sees them."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from common.errors import DataError
from data.media.pictures import to_image
from data.plan_samples import FileContent, PlanSamples, Sample
from data.precompute.encode import decode_pixels
from data.precompute.streams import IMAGES_AHEAD, map_ahead

MAX_SIDE = 176
"""Longer side of a thumbnail in pixels."""


class Thumbnail(NamedTuple):
    """A sample and its small image."""

    sample: Sample
    image: Image.Image


def spread_evenly(indices: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` of the indices, with the first and the last one."""
    num_chosen = min(len(indices), count)
    last_position = len(indices) - 1
    positions = np.linspace(0, last_position, num_chosen).round()
    return indices[positions.astype(np.int64)]


def thumbnails_of_images(samples: PlanSamples, indices: np.ndarray) -> Iterator[Thumbnail]:
    """Yield thumbnails of images and of the first frames of clips.

    Each source is read once. Threads prepare the next thumbnails."""
    chosen_samples = list(samples.at(indices))
    make_thumbnails = partial(thumbnails_of_file, background=samples.config.background)
    contents = samples.read_contents(chosen_samples)
    for thumbnails in map_ahead(make_thumbnails, contents, IMAGES_AHEAD):
        yield from thumbnails


def thumbnails_of_file(file: FileContent, background: str) -> list[Thumbnail]:
    """Return the thumbnails of a file. Raises DataError naming the file."""
    thumbnails = []
    name = file.samples[0].listed.name
    try:
        if isinstance(file.content, DataError):
            raise file.content
        for sample in file.samples:
            clip = sample.planned.clip
            if clip is not None:
                clip = replace(clip, frames=1)
            pixels = decode_pixels(file.content, sample.planned.crop, clip, background)
            thumbnails.append(Thumbnail(sample, to_thumbnail(pixels)))
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return thumbnails


def to_thumbnail(pixels: Tensor) -> Image.Image:
    """Convert pixels (3, H, W) in [-1, 1] to an image with a longer side of MAX_SIDE.

    Smaller images are enlarged by an integer factor."""
    image = to_image(pixels)
    longer_side = max(image.size)
    if longer_side >= MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        return image
    zoom = max(1, MAX_SIDE // longer_side)
    size = (image.width * zoom, image.height * zoom)
    return image.resize(size, Image.Resampling.NEAREST)
