"""Contact sheets: one PNG per bucket, with images as training sees them above their captions."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.atomic import write_file
from common.errors import counted
from data.plan_samples import PlanSamples
from data.thumbnails import Thumbnail, spread_evenly, thumbnails_of_images, to_thumbnail
from models.base import ModelFamily
from tools.data.sheet_png import Tile, sheet_png

MAX_IMAGES = 48
"""Images on a sheet."""

BucketSize = tuple[int, int]
"""Width and height in pixels."""


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
        num_expected = min(sheet.num_samples, MAX_IMAGES)
        if num_drawn < num_expected:
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
        chosen_indices = spread_evenly(drawable_indices, MAX_IMAGES)
        width, height = size.tolist()
        sheets[width, height] = SheetPlan(chosen_indices, num_samples)
    return sheets


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
    has_frames = pixels.ndim == 4
    if has_frames:
        pixels = pixels[:, 0]
    return to_thumbnail(pixels)
