"""A dataset that is encoded already, in a folder that `train_lora.py export-dataset` wrote.

Machines without the images can train on it.

<folder>/encoded.json     {"format": 2, "family", "vae", "text", "options"}: how it was encoded
<folder>/listed.arrow     names and captions (ListedSample)
<folder>/planned.arrow    samples to train on (PlannedSample)
<folder>/media, text      stores of latents and of conditioning (data/store/store.py)
"""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.config import DataConfig, SourceConfig
from data.samples import ListedSample, PlannedSample
from data.sources.base import Source
from data.store.store import MISSING, Store, damaged_shards
from data.store.tables import Table

DESCRIPTION = "encoded.json"
LISTED_TABLE = "listed.arrow"
PLANNED_TABLE = "planned.arrow"
STORES = {"media": "media_keys", "text": "caption_keys"}
"""Folder of a store -> the column of PlannedSample with its keys."""
FORMAT = 4
OPTIONS = ("vae_sampling", "masks", "random_flip")
"""Options that decide which tensors a sample has."""
COMPONENTS = {"vae": "VAE", "text": "text encoder", "family": "model family", "format": "format"}


def is_encoded_folder(folder: Path) -> bool:
    """Return whether export-dataset wrote a folder."""
    return (folder / DESCRIPTION).is_file()


def describe_encoding(data: DataConfig, component_hashes: dict[str, str]) -> dict[str, Any]:
    """Return everything that must be equal to train on encoded data."""
    options = {name: getattr(data, name) for name in OPTIONS}
    return {"format": FORMAT, **component_hashes, "options": options}


def options_message(encoded: Any, expected: dict[str, Any]) -> str:
    """Return which options an encoded dataset has other values of than this run."""
    if not isinstance(encoded, dict):
        return "encoded with unknown options"
    texts = []
    for name, value in expected.items():
        encoded_value = encoded.get(name)
        if encoded_value == value:
            continue
        text = f"--data.{name} {encoded_value}, and this run has {value}"
        texts.append(text)
    differences = "; ".join(texts)
    return f"encoded with {differences}. Use the same options"


class EncodedSource(Source):
    """A folder that export-dataset wrote."""

    has_images = False
    is_planned = True

    def __init__(self, config: SourceConfig, data: DataConfig, component_hashes: dict[str, str]):
        """`component_hashes`: hashes of the model's VAE and text encoders."""
        super().__init__(config)
        self.folder = Path(config.path)
        self.expected_description = describe_encoding(data, component_hashes)

    def samples(self) -> Iterator[ListedSample]:
        errors = self._find_errors()
        self.errors += errors
        if errors:
            return
        listed = Table(self.folder / LISTED_TABLE, ListedSample)
        for index, sample in self.planned_table.rows():
            original = listed[sample.listed]
            yield ListedSample(
                row=index,
                name=original.name,
                captions=original.captions,
                stamp="",
                repeats=original.repeats * self.config.repeats,
            )

    def planned(self, row: int) -> PlannedSample:
        return self.planned_table[row]

    @cached_property
    def planned_table(self) -> Table[PlannedSample]:
        """Open the table of planned samples."""
        return Table(self.folder / PLANNED_TABLE, PlannedSample)

    def _find_errors(self) -> list[str]:
        """Return how the folder differs from what this run needs, and its damages."""
        try:
            text = (self.folder / DESCRIPTION).read_text(encoding="utf-8")
            description = dict(json.loads(text))
            errors = self._compare_description(description)
            if description.get("format") == FORMAT:
                for name in STORES:
                    errors += self._check_store(name)
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            return [f"{self.folder}: not a dataset that export-dataset wrote: {error}"]
        return errors

    def _compare_description(self, description: dict[str, Any]) -> list[str]:
        """Return an error for each difference of the encoding."""
        errors = []
        for name, expected in self.expected_description.items():
            value = description.get(name)
            if value == expected:
                continue
            if name == "options":
                message = options_message(value, expected)
            else:
                message = (
                    f"encoded with another {COMPONENTS[name]} than that of --model.path ({value}, "
                    f"not {expected})"
                )
                if name == "vae":
                    message += ", or with another --model.vae_dtype or --model.vae_tiling"
            errors.append(f"{self.folder}: {message}")
        return errors

    def _check_store(self, name: str) -> list[str]:
        """Return an error for each damaged shard, or one if rows are missing."""
        folder = self.folder / name
        damaged = damaged_shards(folder, is_own=False)
        if damaged:
            return [f"{shard}: damaged. Export the dataset again" for shard in damaged]
        keys = self.planned_table.keys(STORES[name])
        num_missing = np.count_nonzero(Store(folder).find(keys) == MISSING)
        if num_missing:
            return [f"{folder}: {num_missing} of its rows are missing"]
        return []
