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
    counts = tables.lengths(rows.column("media"))
    assert len(set(counts.tolist())) <= 1, "all rows have as many media"
    media = tables.keys(rows.column("media")).reshape(len(counts), -1)[chosen]
    text_counts = tables.lengths(rows.column("texts"))
    starts = np.concatenate([[0], np.cumsum(text_counts)])
    texts = tables.keys(rows.column("texts"))
    columns = {
        "repeats": rows.column("repeats").to_numpy()[chosen],
        "crop": rows.column("crop").combine_chunks().flatten().to_numpy().reshape(-1, 8)[chosen],
        "media": stores.media.find(media.reshape(-1)).reshape(media.shape),
        "entry": rows.column("entry").to_numpy()[chosen],
        "weight": rows.column("weight").to_numpy()[chosen],
        "dropout": rows.column("dropout").to_numpy()[chosen],
    }
    first_text = texts[starts[:-1]][chosen]
    assert not (columns["media"] == MISSING).any(), "every row was encoded"
    bucket = buckets_of(columns, stores, first_text)
    order = np.arange(len(chosen))
    for column in (first_text, media[:, 0], columns["repeats"], *bucket):
        order = order[np.argsort(column[order], kind="stable")]  # the last sort counts most
    arrays = {name: column[order] for name, column in columns.items()}
    taken = chosen[order]
    lengths = text_counts[taken]
    ends = np.cumsum(lengths)
    items = np.arange(lengths.sum()) + np.repeat(starts[taken] - (ends - lengths), lengths)  # lists in the new order
    arrays |= {
        "text_first": np.concatenate([[0], ends]),
        "texts": stores.text.find(texts[items]),
        "shares": flat(rows.column("shares"))[items],
        "bucket": np.stack(bucket)[:, order],
    }
    assert not (arrays["texts"] == MISSING).any(), "every caption was encoded"
    identity = digest(
        media[order].tobytes(), texts[items].tobytes(),
        *(arrays[name].tobytes() for name in ("repeats", "shares", "crop", "weight", "dropout")),
    )  # fmt: skip
    return save(folder, identity, arrays, stores)


def buckets_of(columns: dict[str, np.ndarray], stores: Stores, first_text: np.ndarray) -> list[np.ndarray]:
    """What rows have in common that may share a batch: size, and dtypes and shapes of all tensors."""
    return [
        stores.text.kinds(stores.text.find(first_text)),
        stores.media.kinds(columns["media"][:, 0]),
        columns["crop"][:, CROP_WIDTH],
        columns["crop"][:, CROP_HEIGHT],
    ]


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
    repeats, bucket = arrays["repeats"], arrays["bucket"]
    if not len(repeats):
        return []
    another = (bucket[:, 1:] != bucket[:, :-1]).any(0)
    starts = np.concatenate([[0], 1 + np.flatnonzero(another | (repeats[1:] != repeats[:-1]))])
    ends = np.concatenate([starts[1:], [len(repeats)]])
    result: list[list[list[int]]] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if start == 0 or another[start - 1]:
            result.append([])
        result[-1].append([start, end - start, int(repeats[start])])
    return result


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
