"""One shard of a store: a folder with a `datasets` dataset, opened for reading."""

import os
import threading
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from common.errors import DataError
from common.hashing import hash_number
from data.store.keys import key_array
from data.store.schema import TensorColumn, TensorSpec, VariableLengths, has_variable_length

DATA_SUFFIX = ".data"
SEEK_LOCK = threading.Lock()
HAS_POSITIONED_READS = hasattr(os, "preadv")
"""Windows has no reads at a position that leave the file's own position alone."""


class Shard:
    """The keys of a shard, and the positions of its tensors. No file stays open or mapped."""

    def __init__(self, folder: Path):
        self.path = data_path(folder)
        content = pa.memory_map(str(self.path)).read_buffer()
        table = pa.ipc.open_stream(content).read_all()
        keys = table.column("key")
        self.keys = key_array(keys.to_pylist())
        self.columns: dict[str, TensorColumn] = {}
        for column_name in table.schema.names:
            if column_name.endswith(DATA_SUFFIX):
                name = column_name.removesuffix(DATA_SUFFIX)
                column = TensorColumn(table, name, content.address)
                self.columns[name] = column

    def signatures(self, variable_lengths: VariableLengths) -> np.ndarray:
        """Return for each row a number that is equal for rows which can share a batch.

        It follows from names, dtypes and shapes of the row's tensors, except the numbers of tokens
        of tensors with variable lengths."""
        columns = self.columns.values()
        spec_indices = np.column_stack([column.spec_indices for column in columns])
        combinations, inverse = np.unique(spec_indices, axis=0, return_inverse=True)
        signatures = []
        for combination in combinations.tolist():
            descriptions = []
            for name, index in zip(self.columns, combination, strict=True):
                spec = self.columns[name].specs[index]
                description = describe_tensor(name, spec, variable_lengths)
                descriptions.append(description)
            signature = hash_number("kind", *descriptions)
            signatures.append(signature)
        unsigned = np.array(signatures, np.uint64)
        return unsigned.astype(np.int64)[inverse]

    def read_into(self, name: str, row: int, target: memoryview) -> None:
        """Fill `target` (bytes) with the bytes of a row's tensor."""
        offset = self.columns[name].offsets.item(row)
        file = open_data(self.path)
        while target:
            num_read = read_at(file, target, offset)
            if not num_read:
                raise DataError(
                    f"{self.path}: is too short. Delete {self.path.parent}, and its rows are "
                    "encoded again"
                )
            target = target[num_read:]
            offset += num_read


class StoredRow(NamedTuple):
    """A row of a shard."""

    shard: Shard
    row: int

    def spec(self, name: str) -> TensorSpec:
        return self.shard.columns[name].spec(self.row)

    def read_into(self, name: str, target: memoryview) -> None:
        self.shard.read_into(name, self.row, target)


def describe_tensor(name: str, spec: TensorSpec, variable_lengths: VariableLengths) -> str:
    """Return a text that is equal for tensors which can share a batch.

    It names the dtype and the sides, without the number of tokens if that varies."""
    dtype, shape = spec
    sides: tuple[object, ...] = shape
    if has_variable_length(name, variable_lengths):
        sides = ("tokens", *shape[1:])
    description = (dtype, sides)
    return f"{name} {description}"


def read_at(file: FileIO, target: memoryview, offset: int) -> int:
    """Read from a position of a file that threads share; return the number of bytes read."""
    if HAS_POSITIONED_READS:
        return os.preadv(file.fileno(), [target], offset)
    with SEEK_LOCK:
        file.seek(offset)
        return file.readinto(target)


@lru_cache(maxsize=128)
def open_data(path: Path) -> FileIO:
    """Open a file that stays open; the number of open files is far below the system's limit."""
    return FileIO(path, "rb")


@lru_cache(maxsize=512)
def open_shard(folder: Path) -> Shard:
    return Shard(folder)


def close_shards() -> None:
    """Forget all open shards and files, which may be about to be removed."""
    open_shard.cache_clear()
    open_data.cache_clear()


def data_path(folder: Path) -> Path:
    """Return the data file of a shard."""
    return folder / "data-00000-of-00001.arrow"
