"""Encoded images with their captions, whose rows are read from disk on demand."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data.schedule import Segment
from data.store import tables
from data.store.schema import MEDIA_TENSORS, Ragged
from data.store.store import Store

CROP_HEIGHT, CROP_WIDTH = 7, 6  # of the fields of buckets.Crop


ARRAYS = ("entry", "media", "text_first", "texts", "shares", "crop", "weight", "dropout")


@dataclass(frozen=True)
class Stores:
    """Where the run's latents and conditioning are."""

    media: Store
    text: Store
    ragged: Ragged = field(default_factory=dict)
    """As the family's."""


class LatentDataset:
    """Encoded images with their captions; rows are read from disk when they are asked for."""

    def __init__(self, folder: Path, stores: Stores, mask_floor: float = 0.0):
        """`folder`: what write_index wrote, with the listing for names and captions, which training does not read.
        `mask_floor`: the least that a mask counts."""
        self.folder, self.listing, self.mask_floor = folder, folder / "listing.arrow", mask_floor
        about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.fingerprint: str = about["fingerprint"]
        self.buckets = tuple(
            tuple(Segment(*segment) for segment in bucket) for bucket in about["segments"]
        )
        self.empty_text: int = about["empty_text"]
        self.media, self.text, self.ragged = stores.media, stores.text, stores.ragged
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}

    def __len__(self) -> int:
        return len(self.arrays["entry"])

    @property
    def epoch_size(self) -> int:
        """Visits per epoch."""
        return sum(segment.visits for bucket in self.buckets for segment in bucket)

    def entry(self, row: int) -> dict[str, Any]:
        """Where a row comes from."""
        return tables.mapped(self.listing).slice(int(self.arrays["entry"][row]), 1).to_pylist()[0]

    def name(self, row: int) -> str:
        return self.entry(row)["name"]

    def first_captions(self) -> Iterator[str]:
        """Of each row the first of its captions."""
        table = tables.mapped(self.listing).select(["captions"])
        for _, cells in tables.rows_of(table, np.asarray(self.arrays["entry"])):
            yield (cells["captions"] or [""])[0]

    def captions(self, count: int) -> list[str]:
        """The first captions that differ."""
        found: dict[str, None] = {}
        for caption in self.first_captions():
            found.setdefault(caption)
            if len(found) == count:
                break
        return list(found)

    def size(self, row: int) -> tuple[int, int]:
        """Height and width in pixels."""
        crop = self.arrays["crop"][row]
        return int(crop[CROP_HEIGHT]), int(crop[CROP_WIDTH])

    def latent_shape(self, row: int) -> tuple[int, ...]:
        """(C, [F,] h, w) of a row's latents, which are not read."""
        part, place = self.media.part(int(self.arrays["media"][row, 0]))
        return part.columns["latents"].kind(place)[1]

    def latent_frames(self, row: int) -> int:
        """Frames of a row's latents; 1 of an image."""
        _, *frames, _, _ = self.latent_shape(row)
        return frames[0] if frames else 1

    def text_of(self, row: int, draw: float | None) -> int:
        """The place of a row's caption: of several, the one that `draw` in [0, 1) falls on, or the
        first."""
        first, last = self.arrays["text_first"][row : row + 2]
        if last - first == 1 or draw is None:
            return int(self.arrays["texts"][first])
        ends = np.cumsum(self.arrays["shares"][first:last])
        return int(
            self.arrays["texts"][
                first + min(np.searchsorted(ends, draw * ends[-1], "right"), last - first - 1)
            ]
        )

    def latents(self, row: int) -> Tensor:
        """Raw latents (C, [F,] h, w) of one row."""
        return self.media.stacked([int(self.arrays["media"][row, 0])], "latents")[0]

    def cond(self, row: int) -> dict[str, Tensor]:
        """Conditioning of one row with its first caption, without batch dimension and padding."""
        media = int(self.arrays["media"][row, 0])
        own = {
            name: self.media.stacked([media], name)[0]
            for name in self.media.columns(media)
            if name not in MEDIA_TENSORS
        }
        return self.text.row(int(self.arrays["texts"][self.arrays["text_first"][row]])) | own
