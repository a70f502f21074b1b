"""One part of a store, opened for reading."""

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from common.errors import DataError
from data.schedule import key
from data.store import schema
from data.store.hashing import KEY_BYTES
from data.store.schema import Ragged, is_ragged


class Part:
    """One part, opened for reading."""

    def __init__(self, folder: Path):
        self.path = data_file(folder)
        mapped = pa.memory_map(str(self.path))
        whole = mapped.read_buffer()
        table = pa.ipc.open_stream(whole).read_all()
        self.keys = np.array(table.column("key").to_pylist(), f"S{KEY_BYTES}")
        names = [
            name.removesuffix(".data") for name in table.schema.names if name.endswith(".data")
        ]
        self.columns = {name: schema.Column(table, name, whole.address) for name in names}

    def kinds(self, ragged: Ragged) -> np.ndarray:
        """For each row a number that follows from the names, dtypes and shapes of its tensors, but not from the number
        of tokens of those that are `ragged`."""

        def said(name: str, kind: tuple[torch.dtype, tuple[int, ...]]) -> str:
            return (
                f"{name} {(kind[0], ('tokens', *kind[1][1:])) if is_ragged(name, ragged) else kind}"
            )

        numbers = np.stack([column.kinds for column in self.columns.values()], 1)
        different, of_rows = np.unique(numbers, axis=0, return_inverse=True)
        columns = list(self.columns.items())
        keys = [
            key(
                "kind",
                *(
                    said(name, column.different[i])
                    for i, (name, column) in zip(line, columns, strict=True)
                ),
            )
            for line in different.tolist()
        ]
        return np.array(keys, np.uint64).astype(np.int64)[of_rows]

    def read_into(self, name: str, row: int, target: memoryview) -> None:
        """Fills `target` (bytes) with a tensor's bytes."""
        first, file = self.columns[name].first.item(row), opened(self.path)
        while target:
            got = os.preadv(file.fileno(), [target], first)
            if not got:
                raise DataError(
                    f"{self.path}: ends too soon; delete {self.path.parent}, and it is encoded again"
                )
            target, first = target[got:], first + got


@lru_cache(maxsize=128)
def opened(path: Path):
    """Files kept open: as many as never to reach a limit of the operating system."""
    return open(path, "rb", buffering=0)


@lru_cache(maxsize=512)
def open_part(folder: Path) -> Part:
    return Part(folder)


def data_file(folder: Path) -> Path:
    return folder / "data-00000-of-00001.arrow"
