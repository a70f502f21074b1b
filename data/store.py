"""A folder of encoded tensors on disk, addressed by content; written in parts, each whole or absent; memory-mapped.

<folder>/part-<hash of its keys>/    a `datasets` dataset, see schema.py
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import datasets
from torch import Tensor

from data import schema
from data.config import DataError
from data.identity import digest

ROWS_PER_PART = 256


class Store:
    """Tensors by key. Other processes may write parts of their own; `reload` makes them visible here."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.reload()

    def reload(self) -> None:
        datasets.disable_progress_bars()
        parts = [datasets.load_from_disk(str(p)) for p in sorted(self.folder.glob("part-*"))]
        # as Arrow: half the time per row of datasets' own Python format, and the keys without decoding a tensor
        self.rows = datasets.concatenate_datasets(parts).with_format("arrow") if parts else None
        keys = self.rows["key"][:].to_pylist() if self.rows is not None else []
        self.index = {key: i for i, key in enumerate(keys)}

    def __contains__(self, key: str) -> bool:
        return key in self.index

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        assert self.rows is not None
        return schema.from_row(self.rows[self.index[key]].to_pylist()[0])

    def write(self, rows: Iterable[tuple[str, dict[str, Tensor]]]) -> None:
        """Writes rows in parts of a bounded size; what was complete when the process died is kept."""
        pending: list[dict] = []
        for key, tensors in rows:
            pending.append(schema.to_row(key, tensors))
            if len(pending) == ROWS_PER_PART:
                self._write_part(pending)
                pending = []
        if pending:
            self._write_part(pending)

    def _write_part(self, rows: list[dict]) -> None:
        names = [column.removesuffix(".data") for column in rows[0] if column.endswith(".data")]
        part = self.folder / f"part-{digest(*(row['key'] for row in rows))}"
        beside = self.folder / f".{part.name}"
        shutil.rmtree(beside, ignore_errors=True)  # left by a process that was killed here
        dataset = datasets.Dataset.from_list(rows, features=schema.features(names))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            dataset.save_to_disk(str(beside))
            beside.rename(part)
        except OSError as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise DataError(f"--data.cache_dir: {part} could not be written: {error}") from error
