"""Arrow tables on disk, written row by row and read where they lie, so that none is ever in memory
as a whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.store.hashing import KEY_BYTES

BATCH = 1000

LISTING = pa.schema(
    [
        ("source", pa.int32()),
        ("row", pa.int64()),
        ("name", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("stamp", pa.string()),
        ("repeats", pa.int32()),
        ("weight", pa.float32()),
        ("mask", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
"""Every row of every source, before its content is looked at."""

ROWS = pa.schema(
    [
        ("entry", pa.int64()),
        ("content", pa.binary(KEY_BYTES)),
        ("media", pa.list_(pa.binary(KEY_BYTES))),
        ("texts", pa.list_(pa.binary(KEY_BYTES))),
        ("shares", pa.list_(pa.float32())),
        ("crop", pa.list_(pa.int32(), 8)),
        ("repeats", pa.int32()),
        ("weight", pa.float32()),
        ("dropout", pa.float32()),
        ("held_out", pa.bool_()),
        ("may_hold_out", pa.bool_()),
        ("clip", pa.list_(pa.float64())),
    ]
)
"""What is trained on. `entry`: its row in the listing. `media`: keys of its latents, of the
mirrored ones too if there are. `texts` and `shares`: keys of its captions, and how often each is
drawn. `crop`: the fields of buckets.Crop. `clip`: those of video.Clip, if it is one."""


class Writer:
    """Takes rows one at a time and writes them in batches."""

    def __init__(self, sink: pa.RecordBatchFileWriter, schema: pa.Schema):
        self.sink, self.schema = sink, schema
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if len(self.rows) == BATCH:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            self.sink.write_batch(pa.RecordBatch.from_pylist(self.rows, self.schema))
        self.rows = []


@contextmanager
def writing(path: Path, schema: pa.Schema) -> Iterator[Writer]:
    """A new table at `path`, there when the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with pa.OSFile(str(beside), "wb") as file, pa.ipc.new_file(file, schema) as sink:
        writer = Writer(sink, schema)
        yield writer
        writer.flush()
    os.replace(beside, path)


def mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def rows_of(
    table: pa.Table, rows: np.ndarray | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and cells of those rows, or of all, a few at a time."""
    count = len(table) if rows is None else len(rows)
    for start in range(0, count, BATCH):
        if rows is None:
            numbers, part = np.arange(start, min(start + BATCH, count)), table.slice(start, BATCH)
        else:
            numbers = rows[start : start + BATCH]
            part = table.take(pa.array(numbers))
        yield from zip(numbers.tolist(), part.to_pylist(), strict=True)


def keys(column: pa.ChunkedArray) -> np.ndarray:
    """A column of keys, or of lists of keys end to end, as fixed-size bytes."""
    parts = []
    for chunk in column.chunks:
        values = chunk.flatten() if pa.types.is_list(chunk.type) else chunk
        data = (
            np.frombuffer(values.buffers()[1], f"S{KEY_BYTES}")
            if len(values)
            else np.empty(0, f"S{KEY_BYTES}")
        )
        parts.append(data[values.offset : values.offset + len(values)])
    return np.concatenate(parts) if parts else np.empty(0, f"S{KEY_BYTES}")


def starts(lengths: np.ndarray) -> np.ndarray:
    """Where each list begins, of lists laid end to end."""
    return np.cumsum(lengths) - lengths


def lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Lengths of the lists of a column."""
    parts = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
