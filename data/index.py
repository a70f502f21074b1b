"""The rows of a run in the order of their buckets, with the places of what belongs to them: mapped arrays on disk."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from data import tables
from data.identity import KEY_BYTES, digest, key_of
from data.schedule import Segment
from data.store import MISSING, Store

CROP_HEIGHT, CROP_WIDTH = 7, 6  # of the fields of buckets.Crop
ARRAYS = ("entry", "media", "text_first", "texts", "shares", "crop", "weight", "dropout")


@dataclass(frozen=True)
class Stores:
    """Where the run's latents and conditioning are."""

    media: Store
    text: Store


def write_index(folder: Path, rows: pa.Table, chosen: np.ndarray, stores: Stores) -> str:
    """Writes the index of the rows `chosen` of a plan, sorted by bucket and content; returns its folder's name.

    All of it follows from what the rows hold, not from the names or the order of files.
    """
    crops = rows.column("crop").combine_chunks().flatten().to_numpy().reshape(-1, 8)[chosen]
    repeats = rows.column("repeats").to_numpy()[chosen]
    counts = tables.lengths(rows.column("media"))
    assert len(set(counts.tolist())) <= 1, "all rows have as many media"
    media = tables.keys(rows.column("media")).reshape(len(counts), -1)[chosen]
    order = np.arange(len(chosen))
    text_counts = tables.lengths(rows.column("texts"))
    starts = np.concatenate([[0], np.cumsum(text_counts)])
    texts, shares = tables.keys(rows.column("texts")), flat(rows.column("shares"))
    first_text = texts[starts[:-1]][chosen]
    for column in (first_text, media[:, 0], repeats, crops[:, CROP_WIDTH], crops[:, CROP_HEIGHT]):
        order = order[np.argsort(column[order], kind="stable")]  # the last sort counts most
    taken = chosen[order]
    counts_taken = text_counts[taken]
    ends = np.cumsum(counts_taken)
    items = np.arange(counts_taken.sum()) + np.repeat(starts[taken] - (ends - counts_taken), counts_taken)
    arrays = {
        "entry": rows.column("entry").to_numpy()[taken],
        "media": stores.media.find(media[order].reshape(-1)).reshape(len(taken), -1),
        "text_first": np.concatenate([[0], ends]),
        "texts": stores.text.find(texts[items]),
        "shares": shares[items],
        "crop": crops[order],
        "weight": rows.column("weight").to_numpy()[taken],
        "dropout": rows.column("dropout").to_numpy()[taken],
    }
    assert not (arrays["media"] == MISSING).any(), "every row was encoded"
    assert not (arrays["texts"] == MISSING).any(), "every caption was encoded"
    identity = digest(
        media[order].tobytes(), texts[items].tobytes(), repeats[order].tobytes(),
        *(arrays[name].tobytes() for name in ("shares", "crop", "weight", "dropout")),
    )  # fmt: skip
    repeated = {"repeats": repeats[order]}
    return save(folder, identity, {**arrays, **repeated}, stores)


def flat(column: pa.ChunkedArray) -> np.ndarray:
    """Lists laid end to end."""
    parts = [chunk.flatten().to_numpy() for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def save(folder: Path, identity: str, arrays: dict[str, np.ndarray], stores: Stores) -> str:
    empty = stores.text.find(np.array([key_of("")], f"S{KEY_BYTES}"))
    about = {
        "fingerprint": identity,
        "segments": segments(arrays),
        "empty_text": int(empty[0]),
        "media_parts": [str(part) for part in stores.media.parts],
        "text_parts": [str(part) for part in stores.text.parts],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", arrays[name])
    (folder / "index.json").write_text(json.dumps(about), encoding="utf-8")
    return identity


def segments(arrays: dict[str, np.ndarray]) -> list[list[list[int]]]:
    """Buckets, and in each of them (first row, count, repeats) of rows that are seen equally often."""
    crops, repeats = arrays["crop"], arrays["repeats"]
    if not len(repeats):
        return []
    what = np.stack([crops[:, CROP_HEIGHT], crops[:, CROP_WIDTH], repeats])
    starts = np.concatenate([[0], 1 + np.flatnonzero((what[:, 1:] != what[:, :-1]).any(0))])
    ends = np.concatenate([starts[1:], [len(repeats)]])
    buckets: dict[tuple[int, int], list[list[int]]] = {}
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        size = (int(crops[start, CROP_HEIGHT]), int(crops[start, CROP_WIDTH]))
        buckets.setdefault(size, []).append([start, end - start, int(repeats[start])])
    return list(buckets.values())


class LatentDataset:
    """Encoded images with their captions; rows are read from disk when they are asked for."""

    def __init__(self, folder: Path, listing: Path, stores: Stores, mask_floor: float = 0.0):
        """`listing`: for names and captions, which training does not read. `mask_floor`: the least that counts."""
        self.folder, self.listing, self.mask_floor = folder, listing, mask_floor
        about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.fingerprint: str = about["fingerprint"]
        self.buckets = tuple(tuple(Segment(*segment) for segment in bucket) for bucket in about["segments"])
        self.empty_text: int = about["empty_text"]
        self.media, self.text = stores.media, stores.text
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

    def text_of(self, row: int, draw: float) -> int:
        """The place of a row's caption: of several, the one that `draw` in [0, 1) falls on."""
        first, last = self.arrays["text_first"][row : row + 2]
        if last - first == 1:
            return int(self.arrays["texts"][first])
        ends = np.cumsum(self.arrays["shares"][first:last])
        return int(self.arrays["texts"][first + min(np.searchsorted(ends, draw * ends[-1], "right"), last - first - 1)])

    def latents(self, row: int) -> Tensor:
        """Raw latents (C, h, w) of one row."""
        return self.media.stacked([int(self.arrays["media"][row, 0])], "latents")[0]

    def cond(self, row: int) -> dict[str, Tensor]:
        """Conditioning of one row with its first caption, without batch dimension."""
        return self.text.row(int(self.arrays["texts"][self.arrays["text_first"][row]]))
