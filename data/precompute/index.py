"""The index of a data set: its samples in training order, with the row ids of their tensors."""

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.hashing import hash_of
from data.dataset import (
    CAPTIONS_FILE,
    CLASS_CAPTIONS_FILE,
    PROBABILITIES_FILE,
    SAMPLES_FILE,
    DatasetIndex,
    Stores,
    record_dtype,
)
from data.media.buckets import Crop
from data.samples import PlannedSample, media_keys
from data.store.keys import KEY_BYTES, key_array, key_of
from data.store.store import MISSING, Store
from data.store.tables import Table, list_starts


class TrainingOrder(NamedTuple):
    """The order of samples: by bucket, repeats and content."""

    rows: np.ndarray
    """Index of each sample in the table of planned samples."""
    starts_bucket: np.ndarray
    """True where a sample is the first one of a bucket."""
    caption_signatures: np.ndarray
    """Signature of each sample's conditioning."""


def write_index(
    folder: Path,
    planned: Table[PlannedSample],
    chosen: np.ndarray,
    stores: Stores,
    extra_prompts: Sequence[str] = (),
) -> str:
    """Write the index of the planned samples with the indices `chosen`; return its content hash."""
    folder.mkdir(parents=True, exist_ok=True)
    order = training_order(planned, chosen, stores)
    return IndexWriter(folder, planned, stores).write(order, extra_prompts)


class IndexWriter:
    """Writes an index, and hashes all columns on which training depends.

    One column of the table is in memory at a time, in addition to the order and the records."""

    def __init__(self, folder: Path, planned: Table[PlannedSample], stores: Stores):
        self.folder, self.planned, self.stores = folder, planned, stores
        self.hash_state = hashlib.blake2b(digest_size=KEY_BYTES)
        self.class_hash = ""

    def write(self, order: TrainingOrder, extra_prompts: Sequence[str]) -> str:
        """Write the samples in this order; return the content hash."""
        stores = self.stores
        empty_key = key_of("")
        empty_caption = stores.text.find(key_array([empty_key]))
        is_droppable = can_drop_captions(order, empty_caption, stores)
        num_never_dropped = self._write_samples(order.rows, is_droppable)
        self._write_captions(order.rows)
        repeats = self.planned.column("repeats")[order.rows]
        index = DatasetIndex(
            content_hash=self.hash_state.hexdigest(),
            segments=find_segments(repeats, order.starts_bucket),
            empty_caption=empty_caption.item(),
            num_never_dropped=num_never_dropped,
            media_shards=list(map(str, stores.media.shards)),
            text_shards=list(map(str, stores.text.shards)),
            extra_prompts=self._find_prompts(extra_prompts),
            class_hash=self.class_hash,
        )
        index.save(self.folder)
        return index.content_hash

    def _write_samples(self, rows: np.ndarray, is_droppable: np.ndarray) -> int:
        """Write the record of each sample; return how many captions are never dropped."""
        planned = self.planned
        media = self._hash(media_keys(planned)[rows])
        records = np.zeros(len(rows), record_dtype(media.shape[1]))
        records["media"] = find_rows(media, self.stores.media)
        records["listed"] = planned.column("listed")[rows]
        records["weight"] = self._hash(planned.column("weight")[rows])
        dropout = planned.column("caption_dropout")[rows]
        is_never_dropped = ~is_droppable & (dropout > 0)
        dropout[is_never_dropped] = 0
        records["caption_dropout"] = self._hash(dropout)
        self._hash(planned.column("repeats")[rows])
        crops = records["crop"]
        for position, field in enumerate(fields(Crop)):
            crops[:, position] = planned.nested_column("crop", field.name)[rows]
        self._hash(crops)
        num_captions = planned.lengths("caption_keys")[rows]
        records["num_captions"] = num_captions
        records["first_caption"] = list_starts(num_captions)
        np.save(self.folder / SAMPLES_FILE, records)
        return int(is_never_dropped.sum())

    def _write_captions(self, rows: np.ndarray) -> None:
        """Write the captions of the samples one after another, and their probabilities."""
        planned = self.planned
        lengths = planned.lengths("caption_keys")
        starts = list_starts(lengths)[rows]
        lengths = lengths[rows]
        ends = np.cumsum(lengths)
        self._hash(np.concatenate([[0], ends]))
        # position in the table of each caption in the new order
        shifts = np.repeat(starts - list_starts(lengths), lengths)
        positions = np.arange(len(shifts)) + shifts
        probabilities = planned.column("caption_probabilities")[positions]
        np.save(self.folder / PROBABILITIES_FILE, self._hash(probabilities))
        keys = planned.keys("caption_keys")[positions]
        caption_ids = find_rows(self._hash(keys), self.stores.text)
        np.save(self.folder / CAPTIONS_FILE, caption_ids)
        self._write_class_captions(positions)

    def _write_class_captions(self, positions: np.ndarray) -> None:
        """Write the captions with the class instead of the trigger, if the run uses these.

        They are not in the content hash, but in that of the index."""
        if not self.planned.lengths("class_caption_keys").any():
            return
        class_keys = self.planned.keys("class_caption_keys")[positions]
        class_ids = find_rows(class_keys, self.stores.text)
        np.save(self.folder / CLASS_CAPTIONS_FILE, class_ids)
        self.class_hash = hash_of(class_keys.tobytes())

    def _find_prompts(self, prompts: Sequence[str]) -> dict[str, int]:
        """Return the row ids of the prompts that are encoded besides the captions.

        They are not in the content hash: the order of the samples is that of a run without them."""
        keys = key_array([key_of(prompt) for prompt in prompts])
        row_ids = find_rows(keys, self.stores.text)
        return dict(
            zip(
                prompts,
                row_ids.tolist(),
                strict=True,
            )
        )

    def _hash(self, values: np.ndarray) -> np.ndarray:
        """Add a column to the content hash, and return it."""
        contiguous = np.ascontiguousarray(values)
        self.hash_state.update(contiguous.data)
        return values


def find_rows(keys: np.ndarray, store: Store) -> np.ndarray:
    """Return the row ids of keys, in an array of the same shape.

    The store has all of them, because every sample was encoded."""
    row_ids = store.find(keys.reshape(-1))
    is_missing = row_ids == MISSING
    assert not is_missing.any()
    return row_ids.reshape(keys.shape)


def can_drop_captions(
    order: TrainingOrder, empty_caption: np.ndarray, stores: Stores
) -> np.ndarray:
    """Return whether the conditioning of each sample can share a batch with the empty prompt."""
    if empty_caption.item() == MISSING:
        return np.ones(len(order.rows), bool)
    signature = stores.text.signatures(empty_caption, stores.variable_lengths)
    return order.caption_signatures == signature


def training_order(
    planned: Table[PlannedSample], chosen: np.ndarray, stores: Stores
) -> TrainingOrder:
    """Return the order of the chosen samples, which follows from what they hold.

    Samples of a bucket may share a batch: they have one size, and their tensors have the same
    names, dtypes and shapes, except the numbers of tokens of tensors with variable lengths."""
    num_captions = planned.lengths("caption_keys")
    first_captions = list_starts(num_captions)[chosen]
    captions = planned.keys("caption_keys")[first_captions]
    media = media_keys(planned)[chosen, 0]
    repeats = planned.column("repeats")[chosen]
    caption_rows = stores.text.find(captions)
    caption_signatures = stores.text.signatures(caption_rows, stores.variable_lengths)
    media_signatures = stores.media.signatures(stores.media.find(media))
    bucket_columns = (
        caption_signatures,
        media_signatures,
        planned.nested_column("crop", "crop_width")[chosen],
        planned.nested_column("crop", "crop_height")[chosen],
    )
    order = np.lexsort((captions, media, repeats, *bucket_columns))  # the last column counts most
    starts_bucket = np.zeros(len(chosen), bool)
    for column in bucket_columns:
        starts_bucket |= differs_from_previous(column[order])
    return TrainingOrder(chosen[order], starts_bucket, caption_signatures[order])


def differs_from_previous(values: np.ndarray) -> np.ndarray:
    """Return whether each value differs from the one before; true for the first."""
    differs = np.ones(len(values), bool)
    previous = values[:-1]
    differs[1:] = values[1:] != previous
    return differs


def find_segments(repeats: np.ndarray, starts_bucket: np.ndarray) -> list[list[list[int]]]:
    """Return the segments of each bucket: first sample, number of samples, repeats."""
    starts_segment = starts_bucket | differs_from_previous(repeats)
    starts = np.flatnonzero(starts_segment)
    ends = np.append(starts[1:], len(repeats))
    buckets: list[list[list[int]]] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if starts_bucket[start]:
            buckets.append([])
        num_repeats = repeats.item(start)
        segment = [start, end - start, num_repeats]
        buckets[-1].append(segment)
    return buckets
