"""A folder of encoded tensors, found by keys that follow from their content.

<folder>/shard-<hash of its keys>/    a `datasets` dataset (schema.py) and check.json with its hash

Rows are written in shards. Each shard is complete or does not exist. A row is read with one
positioned read from the operating system's page cache directly into the batch. No file stays
mapped, so reading a whole data set takes no more memory than reading one row.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from common.atomic import (
    WriteError,
    flush_file,
    publish_folder,
    remove_old,
    unique_partial_path,
    write_file,
)
from common.errors import DataError
from common.hashing import hash_of, sha256_of_file
from data.store import schema
from data.store.collate import collate, stack_rows
from data.store.keys import KEY_DTYPE, join_keys, key_array
from data.store.schema import FIXED_LENGTHS, VariableLengths
from data.store.shard import Shard, StoredRow, close_shards, data_path, open_shard

ROWS_PER_SHARD = 1024
BYTES_PER_SHARD = 2**27
CHECK = "check.json"
ROW_BITS = 32
"""Bits of a row id that hold the index of the row in its shard."""
ROW_MASK = (1 << ROW_BITS) - 1
MISSING = -1
"""Row id of a key that a store does not have."""
MAX_PARTIAL_DAYS = 1
"""Age at which the unfinished shard of a killed process is removed."""


class Store:
    """Tensors by key, or by row id: number of a shard and index of a row in it, as one int64.

    Other processes may write more shards meanwhile; `reload` makes them visible here."""

    def __init__(self, folder: Path, other_folders: tuple[Path, ...] = ()):
        """`other_folders`: folders whose shards are read too, but not written."""
        self.folder, self.other_folders = folder, other_folders
        self.reload()

    def reload(self) -> None:
        """Read the keys of all shards that exist now."""
        self.shards: list[Path] = []
        for folder in (self.folder, *self.other_folders):
            self.shards += complete_shards(folder)
        keys = []
        row_ids = [np.empty(0, np.int64)]
        for number, shard in enumerate(self.shards):
            shard_keys = Shard(shard).keys
            first_id = number << ROW_BITS
            last_id = first_id + len(shard_keys)
            keys.append(shard_keys)
            row_ids.append(np.arange(first_id, last_id))
        all_keys = join_keys(keys)
        order = np.argsort(all_keys, kind="stable")
        self.keys = all_keys[order]
        self.row_ids = np.concatenate(row_ids)[order]

    def __len__(self) -> int:
        return len(self.keys)

    def use_shards(self, shards: list[str]) -> None:
        """Number the shards in this order, and forget the keys, which take 24 bytes per row.

        Training reads rows by row id alone."""
        self.shards = [Path(shard) for shard in shards]
        self.keys = np.empty(0, KEY_DTYPE)
        self.row_ids = np.empty(0, np.int64)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the row id of each key, or MISSING."""
        if not len(self.keys):
            return np.full(len(keys), MISSING, np.int64)
        last = len(self.keys) - 1
        positions = np.searchsorted(self.keys, keys).clip(max=last)
        is_found = self.keys[positions] == keys
        row_ids = self.row_ids[positions]
        return np.where(is_found, row_ids, MISSING)

    def __contains__(self, key: bytes) -> bool:
        return self.find(key_array([key])).item() != MISSING

    def __getitem__(self, key: bytes) -> dict[str, Tensor]:
        """Return the tensors of the row with this key. Raises KeyError."""
        keys = key_array([key])
        row_ids = self.find(keys)
        row_id = row_ids.item()
        if row_id == MISSING:
            raise KeyError(key.hex())
        return self.read_row(row_id)

    def locate(self, row_id: int) -> StoredRow:
        """Return the shard of a row, and its index in the shard."""
        shard = open_shard(self.shards[row_id >> ROW_BITS])
        return StoredRow(shard, row_id & ROW_MASK)

    def tensor_names(self, row_id: int) -> list[str]:
        return list(self.locate(row_id).shard.columns)

    def read_row(self, row_id: int) -> dict[str, Tensor]:
        """Return the tensors of a row."""
        batch = self.read_batch([row_id])
        return {name: tensors[0] for name, tensors in batch.items()}

    def read_batch(
        self, row_ids: Iterable[int], variable_lengths: VariableLengths = FIXED_LENGTHS
    ) -> dict[str, Any]:
        """Return all tensors of the rows as one batch per name (collate.py)."""
        rows = [self.locate(row_id) for row_id in row_ids]
        return collate(rows, variable_lengths)

    def read_tensor(self, row_id: int, name: str) -> Tensor:
        """Return one tensor of a row."""
        return stack_rows([self.locate(row_id)], name)[0]

    def signatures(
        self, row_ids: np.ndarray, variable_lengths: VariableLengths = FIXED_LENGTHS
    ) -> np.ndarray:
        """Return for each row a number that is equal for rows which can share a batch."""
        result = np.zeros(len(row_ids), np.int64)
        shard_numbers = row_ids >> ROW_BITS
        row_indices = row_ids & ROW_MASK
        order = np.argsort(shard_numbers, kind="stable")
        numbers, starts = np.unique(shard_numbers[order], return_index=True)
        groups = np.split(order, starts[1:])
        for number, group in zip(numbers.tolist(), groups, strict=True):
            signatures = Shard(self.shards[number]).signatures(variable_lengths)
            result[group] = signatures[row_indices[group]]
        return result

    @contextmanager
    def writer(self) -> "Iterator[StoreWriter]":
        """Yield a writer. The last rows are written when the block ends without an error."""
        writer = StoreWriter(self.folder)
        yield writer
        writer.flush()

    def write(self, rows: Iterable[tuple[bytes, dict[str, Tensor]]]) -> None:
        """Write rows: keys with their tensors."""
        with self.writer() as writer:
            for key, tensors in rows:
                writer.add(key, tensors)


class StoreWriter:
    """Takes rows one at a time and writes them in shards of a limited size.

    Shards that are complete survive a kill."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.buffers: dict[tuple[str, ...], ShardBuffer] = {}
        """All rows of a shard have tensors with the same names."""

    def add(self, key: bytes, tensors: dict[str, Tensor]) -> None:
        """Add a row."""
        names = tuple(tensors)
        if names not in self.buffers:
            self.buffers[names] = ShardBuffer(list(names))
        buffer = self.buffers[names]
        buffer.add(key, tensors)
        if buffer.is_full:
            buffer.write(self.folder)
            del self.buffers[names]

    def flush(self) -> None:
        """Write the rows that are not written yet."""
        for buffer in self.buffers.values():
            buffer.write(self.folder)
        self.buffers = {}


class ShardBuffer:
    """Rows that will be written as one shard."""

    def __init__(self, names: list[str]):
        self.names = names
        self.keys: list[bytes] = []
        self.rows: list[dict[str, Any]] = []
        self.num_bytes = 0

    def add(self, key: bytes, tensors: dict[str, Tensor]) -> None:
        self.keys.append(key)
        self.rows.append(schema.to_row(key, tensors))
        self.num_bytes += sum(tensor.nbytes for tensor in tensors.values())

    @property
    def is_full(self) -> bool:
        return len(self.rows) == ROWS_PER_SHARD or self.num_bytes >= BYTES_PER_SHARD

    def write(self, folder: Path) -> None:
        """Write the shard. Raises DataError if that fails."""
        shard = folder / f"shard-{hash_of(*self.keys)}"
        partial_path = unique_partial_path(shard)
        datasets.disable_progress_bars()
        features = schema.features(self.names)
        dataset = datasets.Dataset.from_list(self.rows, features=features)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            dataset.save_to_disk(str(partial_path), num_shards=1)
            write_check(partial_path)
            publish_folder(partial_path, shard)
        except (OSError, WriteError) as error:
            shutil.rmtree(partial_path, ignore_errors=True)
            message = f"{shard} could not be written: {error}"
            raise DataError(message) from error


def complete_shards(folder: Path) -> list[Path]:
    """Return the shards in a folder that have their data file."""
    return [shard for shard in sorted(folder.glob("shard-*")) if data_path(shard).is_file()]


def damaged_shards(folder: Path, is_own: bool = True) -> list[Path]:
    """Return the shards in a folder whose data differ from the written data.

    A shard is not read if its file has the size and the time that it was written with. An intact
    copy in the own cache is not read next time either."""
    return [shard for shard in sorted(folder.glob("shard-*")) if not is_intact(shard, is_own)]


def remove_shards(folder: Path, shards: Iterable[Path]) -> None:
    """Remove shards, and the unfinished shards of processes that were killed long ago."""
    close_shards()  # Windows cannot remove open files
    for shard in shards:
        shutil.rmtree(shard, ignore_errors=True)
    remove_old(folder.glob(".shard-*"), MAX_PARTIAL_DAYS)


def remove_damaged(folders: Iterable[Path]) -> None:
    """Remove the damaged shards of stores, with a note."""
    for folder in folders:
        shards = damaged_shards(folder)
        for shard in shards:
            print(f"{shard} is damaged: its rows are encoded again")
        remove_shards(folder, shards)


def write_check(shard: Path) -> None:
    """Write the data of a shard to the disk, and its size, time and hash into the check file."""
    path = data_path(shard)
    flush_file(path)
    stat = path.stat()
    check = {
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": sha256_of_file(path),
    }
    write_file(shard / CHECK, json.dumps(check), is_shared=True)


def is_intact(shard: Path, is_own: bool) -> bool:
    """Return whether the data of a shard are as written. Damaged check files count as damage."""
    path = data_path(shard)
    try:
        check = json.loads((shard / CHECK).read_text(encoding="utf-8"))
        stat = path.stat()
        if stat.st_size != check["size"]:
            return False
        if stat.st_mtime_ns == check["mtime_ns"]:
            return True
        has_same_hash = sha256_of_file(path) == check["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if has_same_hash and is_own and os.access(shard, os.W_OK):
        write_check(shard)  # a copy, which need not be read each time
    return has_same_hash
