"""What a metadata file in a folder, or the columns of a dataset, say of each image: captions and
weights."""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DataError
from data.config import SourceConfig

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"  # the column of `datasets`' imagefolder


@dataclass(frozen=True)
class Described:
    """What a metadata file says of an image."""

    captions: list[str] | None
    weight: float


def read_metadata(file: Path, config: SourceConfig, faults: list[str]) -> dict[Path, Described]:
    """By the images' paths, which `file` names as seen from its folder."""
    if config.captions.text is not None and config.weight_column is None:
        return {}
    try:
        rows = list(metadata_rows(file))
    except (OSError, ValueError, csv.Error, DataError) as error:
        faults.append(f"{file}: cannot be read: {error}")
        return {}
    lacking = [] if rows and FILE_NAME in rows[0] else [FILE_NAME]
    lacking += [
        f"{c} (--data.{flag})"
        for flag, c in columns(config).items()
        if not rows or c not in rows[0]
    ]
    if lacking:
        known = ", ".join(map(str, rows[0])) if rows else "none"
        faults.append(f"{file}: no column {' and '.join(lacking)}; it has {known}")
        return {}
    result: dict[Path, Described] = {}
    for number, row in enumerate(rows, 1):
        name = str(row.get(FILE_NAME))
        if not os.path.lexists(file.parent / name):
            faults.append(f"{file} row {number}: {name} is not in {file.parent}")
            continue
        try:
            result[file.parent / name] = described(row, config)
        except DataError as error:
            faults.append(f"{file} row {number}: {name} {error}")
    return result


def columns(config: SourceConfig) -> dict[str, str]:
    """The columns that are read besides that of the image, by the option that names them."""
    wanted = {"captions.column": config.captions.column, "weight_column": config.weight_column}
    if config.captions.text is not None:
        del wanted["captions.column"]
    return {flag: column for flag, column in wanted.items() if column is not None}


def described(row: dict[str, Any], config: SourceConfig) -> Described:
    """A row of a metadata file or of a dataset."""
    captions = None
    if config.captions.text is None:
        captions = captions_of(row.get(str(config.captions.column)))
        if captions is None:
            raise DataError(f"has no caption in {config.captions.column}")
    if config.weight_column is None:
        return Described(captions, 1.0)
    try:
        weight = float(row.get(config.weight_column))  # type: ignore[arg-type]  # None is a fault too
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise DataError(
            f"has no weight of 0 or more in {config.weight_column}: {row.get(config.weight_column)!r}"
        )
    return Described(captions, weight)


def captions_of(cell: Any) -> list[str] | None:
    """One caption or a list of them."""
    texts = [cell] if isinstance(cell, str) else cell
    if (
        isinstance(texts, list)
        and texts
        and all(isinstance(text, str) and is_text(text) for text in texts)
    ):
        return texts
    return None


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: what the system could not decode cannot."""
    return not any(0xD800 <= ord(letter) < 0xE000 for letter in text)


def metadata_rows(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(file).to_pylist()
        return
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".csv":
            yield from csv.DictReader(lines)
            return
        for number, line in enumerate(lines, 1):
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise DataError(f"line {number} is no JSON object")
            if row:
                yield row
