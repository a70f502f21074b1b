"""Contact sheets: one PNG per bucket, with images as training sees them above their captions."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.atomic import write_file
from common.errors import DataError, counted
from data.precompute.encode import decode_pixels
from data.precompute.streams import IMAGES_AHEAD, map_ahead
from models.base import ModelFamily
from tools.data.samples import FileContent, PlanSamples, Sample
from tools.data.sheet_png import MAX_SIDE, Tile, sheet_png
from training.reporting.image_grid import to_image

MAX_IMAGES = 48
"""Images on a sheet."""

BucketSize = tuple[int, int]
"""Width and height in pixels."""


class Thumbnail(NamedTuple):
    """A sample and its small image."""

    sample: Sample
    image: Image.Image


@dataclass
class SheetResult:
    """Files that were written, and notes on sheets that lack images."""

    written_files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 1 if self.notes else 0

    def lines(self) -> list[str]:
        """Return the lines to print."""
        lines = [f"wrote {file}" for file in self.written_files]
        return lines + self.notes


@dataclass
class SheetPlan:
    """The samples to draw for one bucket."""

    indices: np.ndarray
    """Indices of these samples, in ascending order."""
    num_samples: int
    """All samples of the bucket."""
    tiles: list[Tile] = field(default_factory=list)


def draw_sheets(
    samples: PlanSamples, family: ModelFamily, folder: Path, decode: bool
) -> SheetResult:
    """Write a sheet for every bucket into `folder`. `decode`: draw latents instead of images."""
    is_drawable = samples.have_latents() if decode else samples.have_images()
    sheets = plan_sheets(samples, is_drawable)
    no_indices = np.empty(0, np.int64)
    indices = np.concatenate([no_indices, *(sheet.indices for sheet in sheets.values())])
    indices.sort()
    if decode:
        thumbnails = thumbnails_of_latents(samples, family, indices)
    else:
        thumbnails = thumbnails_of_images(samples, indices)
    for sample, image in tqdm(thumbnails, desc="drawing", total=len(indices)):
        captions = sample.listed.captions or [""]
        tile = Tile(image, samples.label(sample), captions[0])
        sheet = sheets[sample.bucket_size]
        sheet.tiles.append(tile)
    return write_sheets(sheets, folder, decode)


def write_sheets(sheets: dict[BucketSize, SheetPlan], folder: Path, decode: bool) -> SheetResult:
    """Write all sheets that have images."""
    result = SheetResult()
    for (width, height), sheet in sheets.items():
        file = folder / f"bucket_{width}x{height}.png"
        num_drawn = len(sheet.tiles)
        if num_drawn:
            title = sheet_title(width, height, sheet, decode)
            write_file(file, sheet_png(title, sheet.tiles))
            result.written_files.append(file)
        if num_drawn < min(sheet.num_samples, MAX_IMAGES):
            note = incomplete_note(file, sheet, decode)
            result.notes.append(note)
    return result


def plan_sheets(samples: PlanSamples, is_drawable: np.ndarray) -> dict[BucketSize, SheetPlan]:
    """Return for every bucket the samples to draw, spread evenly over all that are drawable.

    `is_drawable`: for each sample."""
    sizes = samples.bucket_sizes()
    sheets = {}
    for size in np.unique(sizes, axis=0):
        is_in_bucket = (sizes == size).all(axis=1)
        drawable_indices = np.flatnonzero(is_in_bucket & is_drawable)
        num_samples = int(is_in_bucket.sum())
        width, height = size.tolist()
        sheets[width, height] = SheetPlan(spread_evenly(drawable_indices), num_samples)
    return sheets


def spread_evenly(indices: np.ndarray) -> np.ndarray:
    """Return at most MAX_IMAGES of the indices, with the first and the last one."""
    last_position = len(indices) - 1
    num_chosen = min(len(indices), MAX_IMAGES)
    positions = np.linspace(0, last_position, num_chosen).round()
    return indices[positions.astype(np.int64)]


def sheet_title(width: int, height: int, sheet: SheetPlan, decode: bool) -> str:
    """Return the first line of a sheet."""
    num_drawn = len(sheet.tiles)
    images = counted(sheet.num_samples, "image")
    title = f"{width} x {height} pixels: {num_drawn} of {images}"
    if decode:
        title += ", decoded from latents"
    return title


def incomplete_note(file: Path, sheet: SheetPlan, decode: bool) -> str:
    """Return why a sheet has fewer images than it could have, and what to do."""
    num_drawn = len(sheet.tiles)
    of_all = f"{num_drawn} of {sheet.num_samples} images"
    if decode:
        advice = (
            "To draw all, start the training with these options, which encodes first, or leave out "
            "--decode"
        )
        if not num_drawn:
            return f"{file.name} was not drawn, because nothing is encoded yet. {advice}"
        return f"{file.name} shows {of_all}, those that are encoded. {advice}"
    advice = "Use --decode to draw latents"
    if not num_drawn:
        return f"{file.name} was not drawn, because its samples are latents. {advice}"
    return f"{file.name} shows {of_all}; the other samples are latents. {advice}"


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


@torch.no_grad()
def thumbnails_of_latents(
    samples: PlanSamples, family: ModelFamily, indices: np.ndarray
) -> Iterator[Thumbnail]:
    """Yield thumbnails of decoded latents.

    Latents are decoded one after another, because large ones take gigabytes."""
    if not len(indices):
        return
    device = samples.job.device
    encoders = family.load_encoders("media").to(device)
    chosen_samples = list(samples.at(indices))
    for sample, latents in samples.read_latents(chosen_samples):
        image = decode_thumbnail(family, encoders, latents.to(device))
        yield Thumbnail(sample, image)


def decode_thumbnail(family: ModelFamily, encoders: Any, latents: Tensor) -> Image.Image:
    """Return a thumbnail of latents (C, [F,] h, w); of a video, the first frame."""
    batch = latents[None].float()
    decoded = family.decode_media(encoders, batch)
    pixels = decoded[0].cpu()
    if pixels.ndim == 4:
        pixels = pixels[:, 0]
    return to_thumbnail(pixels)


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
