"""The rows of a run in the order of their buckets, with the places of what belongs to them: mapped
arrays on disk."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.dataset import CROP_HEIGHT, CROP_WIDTH, Stores
from data.store import tables
from data.store.hashing import KEY_BYTES, key_of
from data.store.store import MISSING, Store


def write_index(folder: Path, rows: pa.Table, chosen: np.ndarray, stores: Stores) -> str:
    """Writes the index of the rows `chosen` of a plan, sorted by bucket and content; returns its
    fingerprint.

    All of it follows from what the rows hold, not from the names or the order of files. One array is in memory at a
    time, besides the order.
    """
    taken, bucket, text_kinds = training_order(rows, chosen, stores)
    arrays = Arrays(folder)
    arrays.add_places("media", media_keys(rows)[taken], stores.media)
    arrays.add("weight", rows.column("weight").to_numpy()[taken])
    empty = stores.text.find(np.array([key_of("")], f"S{KEY_BYTES}"))
    dropout = rows.column("dropout").to_numpy()[taken]
    fits = (
        text_kinds == stores.text.kinds(empty, stores.ragged)
        if empty[0] != MISSING
        else np.ones(len(taken), bool)
    )
    arrays.add("dropout", np.where(fits, dropout, 0).astype(np.float32))
    repeats = rows.column("repeats").to_numpy()[taken]
    arrays.add("repeats", repeats)
    arrays.add("crop", crops(rows)[taken])
    arrays.save("entry", rows.column("entry").to_numpy()[taken])
    lengths = tables.lengths(rows.column("texts"))
    starts = tables.starts(lengths)[taken]
    lengths = lengths[taken]
    arrays.add("text_first", np.concatenate([[0], np.cumsum(lengths)]))
    items = np.arange(lengths.sum()) + np.repeat(
        starts - tables.starts(lengths), lengths
    )  # lists in the new order
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
