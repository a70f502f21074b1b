"""Captions and weights of images, from a metadata file in a folder or the columns of a dataset."""

import csv
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.errors import DataError
from data.config import SourceConfig
from data.sources.control_files import column_names, in_columns, names_in_cell, normalized

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_COLUMN = "file_name"
"""Column with the path of the image, as in the image folders of `datasets`."""


@dataclass(frozen=True)
class Description:
    """Captions, weight and control images of an image.

    There are no captions if one caption is configured for all images."""

    captions: list[str] | None
    weight: float
    controls: tuple[Path, ...] = ()


@dataclass
class Metadata:
    """The descriptions in a metadata file, by the paths of the images, and its errors."""

    descriptions: dict[Path, Description] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def read_metadata(file: Path, config: SourceConfig, takes_controls: bool = False) -> Metadata:
    """Read a metadata file. It names images relative to its folder."""
    metadata = Metadata()
    columns = used_columns(config)
    uses_controls = takes_controls and config.control_paths != ()
    if not columns and not uses_controls:
        return metadata
    try:
        rows = list(metadata_rows(file))
    except (OSError, ValueError, csv.Error, DataError) as error:
        metadata.errors.append(f"{file}: cannot be read: {error}")
        return metadata
    control_columns: list[str] = []
    if uses_controls:
        control_columns = column_names(config.control_columns, all_columns(rows))
    if not columns and not control_columns:
        return metadata
    for column in control_columns:
        columns[f"control_columns {column}"] = column
    columns_error = missing_columns_error(rows, columns)
    if columns_error:
        metadata.errors.append(f"{file}: {columns_error}")
        return metadata
    for number, row in enumerate(rows, 1):
        name = str(row.get(FILE_COLUMN))
        image = file.parent / name
        if not os.path.lexists(image):
            metadata.errors.append(f"{file} row {number}: {name} is not in {file.parent}")
            continue
        try:
            description = describe(row, config)
            controls = in_columns(row, control_columns, file.parent)
            metadata.descriptions[image] = replace(description, controls=tuple(controls))
        except DataError as error:
            metadata.errors.append(f"{file} row {number}: {name} {error}")
    return metadata


def missing_columns_error(rows: list[dict[str, Any]], columns: dict[str, str]) -> str | None:
    """Return an error if the rows lack the file name or one of the columns."""
    existing_columns = all_columns(rows)
    missing_columns = []
    if FILE_COLUMN not in existing_columns:
        missing_columns.append(FILE_COLUMN)
    for flag, column in columns.items():
        if column not in existing_columns:
            missing_columns.append(f"{column} (--data.{flag})")
    if not missing_columns:
        return None
    existing = ", ".join(map(str, existing_columns)) or "none"
    return f"no column {' and '.join(missing_columns)}. Its columns: {existing}"


def all_columns(rows: list[dict[str, Any]]) -> list[str]:
    """Return the columns of all rows. A JSON row may lack some of them."""
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    return list(columns)


def named_controls(file: Path, config: SourceConfig) -> set[Path]:
    """Return all control images that a metadata file names. Errors are reported by read_metadata."""
    controls: set[Path] = set()
    with suppress(OSError, ValueError, csv.Error, DataError):
        rows = list(metadata_rows(file))
        for row in rows:
            for column in column_names(config.control_columns, row):
                for name in names_in_cell(row.get(column), column):
                    controls.add(normalized(file.parent / name))
    return controls


def used_columns(config: SourceConfig) -> dict[str, str]:
    """Return the columns of captions and weights, by the option that names each."""
    columns = {}
    if config.captions.text is None:
        columns["captions.column"] = str(config.captions.column)
    if config.weight_column is not None:
        columns["weight_column"] = config.weight_column
    return columns


def describe(row: dict[str, Any], config: SourceConfig) -> Description:
    """Return the description in a row of a metadata file or of a dataset."""
    captions = None
    if config.captions.text is None:
        column = str(config.captions.column)
        captions = captions_of(row.get(column))
        if captions is None:
            raise DataError(f"has no caption in {column}")
    weight = 1.0
    if config.weight_column is not None:
        weight = read_weight(row, config.weight_column)
    return Description(captions, weight)


def read_weight(row: dict[str, Any], column: str) -> float:
    """Return the weight in a column. Raises DataError if it is not a number of 0 or more."""
    value = row.get(column)
    try:
        weight = float(value)  # type: ignore[arg-type]  # None raises a TypeError
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise DataError(f"has no weight of 0 or more in {column}: {value!r}")
    return weight


def captions_of(cell: Any) -> list[str] | None:
    """Return the caption or the list of captions in a cell; None if it has other values."""
    captions = [cell] if isinstance(cell, str) else cell
    if not isinstance(captions, list) or not captions:
        return None
    for caption in captions:
        if not isinstance(caption, str) or not is_utf8(caption):
            return None
    return captions


def is_utf8(text: str) -> bool:
    """Return whether a text can be written as UTF-8. Names that the system cannot decode cannot."""
    return not any(0xD800 <= ord(letter) < 0xE000 for letter in text)


def metadata_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metadata file."""
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
                raise DataError(f"line {number} is not a JSON object")
            if row:
                yield row
