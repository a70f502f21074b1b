"""The rows of a run in the order of their buckets, with the places of what belongs to them: mapped arrays on disk."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from data import tables
from data.collate import Ragged
from data.identity import KEY_BYTES, key_of
from data.schedule import Segment
from data.schema import MEDIA_TENSORS
from data.store import MISSING, Store

CROP_HEIGHT, CROP_WIDTH = 7, 6  # of the fields of buckets.Crop
ARRAYS = ("entry", "media", "text_first", "texts", "shares", "crop", "weight", "dropout")


@dataclass(frozen=True)
class Stores:
    """Where the run's latents and conditioning are."""

    media: Store
    text: Store
    ragged: Ragged = field(default_factory=dict)
    """As the family's."""


def write_index(folder: Path, rows: pa.Table, chosen: np.ndarray, stores: Stores) -> str:
    """Writes the index of the rows `chosen` of a plan, sorted by bucket and content; returns its fingerprint.

    All of it follows from what the rows hold, not from the names or the order of files. One array is in memory at a
    time, besides the order.
    """
    taken, bucket, text_kinds = training_order(rows, chosen, stores)
    arrays = Arrays(folder)
    arrays.add_places("media", media_keys(rows)[taken], stores.media)
    arrays.add("weight", rows.column("weight").to_numpy()[taken])
    empty = stores.text.find(np.array([key_of("")], f"S{KEY_BYTES}"))
    dropout = rows.column("dropout").to_numpy()[taken]
    fits = text_kinds == stores.text.kinds(empty, stores.ragged) if empty[0] != MISSING else np.ones(len(taken), bool)
    arrays.add("dropout", np.where(fits, dropout, 0).astype(np.float32))
    repeats = rows.column("repeats").to_numpy()[taken]
    arrays.add("repeats", repeats)
    arrays.add("crop", crops(rows)[taken])
    arrays.save("entry", rows.column("entry").to_numpy()[taken])
    lengths = tables.lengths(rows.column("texts"))
    starts = tables.starts(lengths)[taken]
    lengths = lengths[taken]
    arrays.add("text_first", np.concatenate([[0], np.cumsum(lengths)]))
    items = np.arange(lengths.sum()) + np.repeat(starts - tables.starts(lengths), lengths)  # lists in the new order
    arrays.add("shares", flat(rows.column("shares"))[items])
    arrays.add_places("texts", tables.keys(rows.column("texts"))[items], stores.text)
    fingerprint = arrays.state.hexdigest()
    about = {
        "fingerprint": fingerprint,
        "segments": segments(repeats, bucket),
        "empty_text": int(empty[0]),
        "never_dropped": int((~fits & (dropout > 0)).sum()),
        "media_parts": [str(part) for part in stores.media.parts],
        "text_parts": [str(part) for part in stores.text.parts],
    }
    (folder / "index.json").write_text(json.dumps(about), encoding="utf-8")
    return fingerprint


class Arrays:
    """Writes arrays into a folder, and hashes what they stand for."""

    def __init__(self, folder: Path):
        self.folder, self.state = folder, hashlib.blake2b(digest_size=KEY_BYTES)
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, name: str, array: np.ndarray) -> None:
        np.save(self.folder / f"{name}.npy", array)

    def add(self, name: str, array: np.ndarray) -> None:
        self.state.update(np.ascontiguousarray(array).data)
        self.save(name, array)

    def add_places(self, name: str, keys: np.ndarray, store: Store) -> None:
        """The places of `keys`, which stand for the content."""
        self.state.update(np.ascontiguousarray(keys).data)
        places = store.find(keys.reshape(-1)).reshape(keys.shape)
        assert not (places == MISSING).any(), "every row was encoded"
        self.save(name, places)


def media_keys(rows: pa.Table) -> np.ndarray:
    counts = tables.lengths(rows.column("media"))
    assert len(set(counts.tolist())) <= 1, "all rows have as many media"
    return tables.keys(rows.column("media")).reshape(len(counts), -1)


def crops(rows: pa.Table) -> np.ndarray:
    """The fields of buckets.Crop, a line for each row."""
    return rows.column("crop").combine_chunks().flatten().to_numpy().reshape(-1, 8)


def training_order(rows: pa.Table, chosen: np.ndarray, stores: Stores) -> tuple[np.ndarray, ...]:
    """`chosen` in the order of buckets, repeats and content; for each whether another bucket begins there, and the kind
    of its caption.

    Rows of a bucket may share a batch: they have one size, and all their tensors the same dtypes and shapes, whatever
    the number of tokens where that is ragged.
    """
    lengths = tables.lengths(rows.column("texts"))
    text = tables.keys(rows.column("texts"))[tables.starts(lengths)][chosen]
    media, crop = media_keys(rows)[chosen, 0], crops(rows)[chosen]
    bucket = [
        stores.text.kinds(stores.text.find(text), stores.ragged),
        stores.media.kinds(stores.media.find(media)),
        crop[:, CROP_WIDTH],
        crop[:, CROP_HEIGHT],
    ]
    order = np.arange(len(chosen))
    for column in (text, media, rows.column("repeats").to_numpy()[chosen], *bucket):
        order = order[np.argsort(column[order], kind="stable")]  # the last sort counts most
    another = np.zeros(len(chosen), bool)
    for column in bucket:
        another[1:] |= column[order][1:] != column[order][:-1]
    return chosen[order], another, bucket[0][order]


def flat(column: pa.ChunkedArray) -> np.ndarray:
    """Lists laid end to end."""
    parts = [chunk.flatten().to_numpy() for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def segments(repeats: np.ndarray, another: np.ndarray) -> list[list[list[int]]]:
    """Buckets, and in each of them (first row, count, repeats) of rows that are seen equally often."""
    if not len(repeats):
        return []
    starts = np.concatenate([[0], 1 + np.flatnonzero(another[1:] | (repeats[1:] != repeats[:-1]))])
    ends = np.concatenate([starts[1:], [len(repeats)]])
    result: list[list[list[int]]] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if start == 0 or another[start]:
            result.append([])
        result[-1].append([start, end - start, int(repeats[start])])
    return result


class LatentDataset:
    """Encoded images with their captions; rows are read from disk when they are asked for."""

    def __init__(self, folder: Path, stores: Stores, mask_floor: float = 0.0):
        """`folder`: what write_index wrote, with the listing for names and captions, which training does not read.
        `mask_floor`: the least that a mask counts."""
        self.folder, self.listing, self.mask_floor = folder, folder / "listing.arrow", mask_floor
        about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.fingerprint: str = about["fingerprint"]
        self.buckets = tuple(tuple(Segment(*segment) for segment in bucket) for bucket in about["segments"])
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
        """The place of a row's caption: of several, the one that `draw` in [0, 1) falls on, or the first."""
        first, last = self.arrays["text_first"][row : row + 2]
        if last - first == 1 or draw is None:
            return int(self.arrays["texts"][first])
        ends = np.cumsum(self.arrays["shares"][first:last])
        return int(self.arrays["texts"][first + min(np.searchsorted(ends, draw * ends[-1], "right"), last - first - 1)])

    def latents(self, row: int) -> Tensor:
        """Raw latents (C, [F,] h, w) of one row."""
        return self.media.stacked([int(self.arrays["media"][row, 0])], "latents")[0]

    def cond(self, row: int) -> dict[str, Tensor]:
        """Conditioning of one row with its first caption, without batch dimension and padding."""
        media = int(self.arrays["media"][row, 0])
        own = {name: self.media.stacked([media], name)[0] for name in self.media.columns(media)
               if name not in MEDIA_TENSORS}  # fmt: skip
        return self.text.row(int(self.arrays["texts"][self.arrays["text_first"][row]])) | own
