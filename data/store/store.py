"""A folder of encoded tensors on disk, addressed by content; written in parts, each whole or
absent.

<folder>/part-<hash of its keys>/    a `datasets` dataset (schema.py) and check.json, the checksum of its file

A row is read with one positioned read from the operating system's page cache into the tensor where
it is wanted: nothing stays mapped but the small columns, so reading a whole data set takes no more
memory than reading one row.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from common.errors import DataError
from data.store import schema
from data.store.collate import batch_of, stacked
from data.store.hashing import KEY_BYTES, digest, is_old, write_beside
from data.store.part import Part, data_file, open_part, opened
from data.store.schema import NONE, Ragged

ROWS_PER_PART = 1024
BYTES_PER_PART = 2**27
CHECK = "check.json"
MISSING = -1


class Store:
    """Tensors by key, or by place: the number of a part and that of a row in it, as one int64. Other processes may
    write parts of their own; `reload` makes them visible here."""

    def __init__(self, folder: Path, also: tuple[Path, ...] = ()):
        """`also`: other folders whose parts are read too."""
        self.folder, self.also = folder, also
        self.reload()

    def reload(self) -> None:
        parts = [
            part for folder in (self.folder, *self.also) for part in sorted(folder.glob("part-*"))
        ]
        self.parts = [part for part in parts if data_file(part).is_file()]
        keys = [Part(part).keys for part in self.parts]
        places = [np.arange(len(k), dtype=np.int64) + (i << 32) for i, k in enumerate(keys)]
        every = np.concatenate(keys) if keys else np.empty(0, f"S{KEY_BYTES}")
        order = np.argsort(every, kind="stable")
        self.keys = every[order]
        self.places = (np.concatenate(places) if places else np.empty(0, np.int64))[order]

    def __len__(self) -> int:
        return len(self.keys)

    def only_places(self, parts: list[str]) -> None:
        """Numbers the parts like this, whatever others there are by now, and forgets the keys: training asks for rows
        by place alone, and the keys take 24 bytes a row."""
        self.parts = [Path(part) for part in parts]
        self.keys, self.places = np.empty(0, f"S{KEY_BYTES}"), np.empty(0, np.int64)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The place of each key, MISSING where there is none."""
        if not len(self.keys):
            return np.full(len(keys), MISSING, np.int64)
        at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.places[at], MISSING)

    def __contains__(self, key: bytes) -> bool:
        return bool(self.find(np.array([key], f"S{KEY_BYTES}"))[0] != MISSING)

    def __getitem__(self, key: bytes) -> dict[str, Tensor]:
        (place,) = self.find(np.array([key], f"S{KEY_BYTES}"))
        if place == MISSING:
            raise KeyError(key.hex())
        return self.row(int(place))

    def part(self, place: int) -> tuple[Part, int]:
        """The part of a place, and the row in it."""
        return open_part(self.parts[place >> 32]), place & (2**32 - 1)

    def columns(self, place: int) -> list[str]:
        """Names of a row's tensors."""
        return list(self.part(place)[0].columns)

    def row(self, place: int) -> dict[str, Tensor]:
        return {name: batch[0] for name, batch in self.rows([place]).items()}

    def rows(self, places: Iterable[int], ragged: Ragged = NONE) -> dict[str, Any]:
        """As collate.batch_of of those rows."""
        return batch_of([self.part(place) for place in places], ragged)

    def kinds(self, places: np.ndarray, ragged: Ragged = NONE) -> np.ndarray:
        """For each place a number that is the same for rows whose tensors have the same names, dtypes and shapes, but
        for the number of tokens of those that are `ragged`."""
        result = np.zeros(len(places), np.int64)
        order = np.argsort(places >> 32, kind="stable")
        numbers, starts = np.unique(places[order] >> 32, return_index=True)
        for number, here in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
            result[here] = Part(self.parts[number]).kinds(ragged)[places[here] & (2**32 - 1)]
        return result

    def stacked(self, places: Iterable[int], name: str) -> Tensor:
        """The tensors `name` of those rows, which have one shape and dtype, as one batch."""
        return stacked([self.part(place) for place in places], name)

    def write(self, rows: Iterable[tuple[bytes, dict[str, Tensor]]]) -> None:
        """Writes rows in parts of a bounded size; what was complete when the process died is kept."""
        pending: dict[tuple[str, ...], list[dict]] = {}  # of a part, all rows have the same tensors
        sizes: dict[tuple[str, ...], int] = {}
        for name, tensors in rows:
            kind = tuple(tensors)
            pending.setdefault(kind, []).append(schema.to_row(name, tensors))
            sizes[kind] = sizes.get(kind, 0) + sum(tensor.nbytes for tensor in tensors.values())
            if len(pending[kind]) == ROWS_PER_PART or sizes[kind] >= BYTES_PER_PART:
                self._write_part(pending.pop(kind))
                del sizes[kind]
        for rest in pending.values():
            self._write_part(rest)

    def _write_part(self, rows: list[dict]) -> None:
        names = [column.removesuffix(".data") for column in rows[0] if column.endswith(".data")]
        part = self.folder / f"part-{digest(*(row['key'] for row in rows))}"
        beside = self.folder / f".{part.name}.{socket.gethostname()}.{os.getpid()}"
        datasets.disable_progress_bars()
        dataset = datasets.Dataset.from_list(rows, features=schema.features(names))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            dataset.save_to_disk(str(beside), num_shards=1)
            write_check(beside)
            beside.rename(part)
        except OSError as error:
            shutil.rmtree(beside, ignore_errors=True)
            if not part.is_dir():  # else another process wrote the same rows meanwhile
                raise DataError(
                    f"--data.cache_dir: {part} could not be written: {error}"
                ) from error


def damaged(folder: Path, ours: bool = True) -> list[Path]:
    """The parts in a store's folder that are not as they were written. A part whose file has the size and the time of
    change that it was written with is not read again, nor is one of `ours` that was found whole."""
    return [part for part in sorted(folder.glob("part-*")) if not is_whole(part, ours)]


def discard(folder: Path, parts: Iterable[Path]) -> None:
    """Removes `parts`, and what was left by processes that were killed more than a day ago."""
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)
    open_part.cache_clear()  # which may hold what was removed
    opened.cache_clear()
    for beside in folder.glob(".part-*"):
        if is_old(beside, 1):
            shutil.rmtree(beside, ignore_errors=True)


def write_check(part: Path) -> None:
    """Writes the size, the time of change and the SHA-256 of a part's data."""
    file = data_file(part)
    with file.open("rb") as content:
        checksum = hashlib.file_digest(content, "sha256").hexdigest()
        os.fsync(content.fileno())
    stat = file.stat()
    write_beside(
        part / CHECK,
        json.dumps({"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": checksum}),
    )


def is_whole(part: Path, ours: bool) -> bool:
    file = data_file(part)
    try:
        noted, stat = json.loads((part / CHECK).read_text(encoding="utf-8")), file.stat()
        if stat.st_size != noted["size"]:
            return False
        if stat.st_mtime_ns == noted["mtime_ns"]:
            return True
        with file.open("rb") as content:
            same = hashlib.file_digest(content, "sha256").hexdigest() == noted["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if same and ours and os.access(part, os.W_OK):
        write_check(part)  # a copy: not to be read as a whole each time
    return same
