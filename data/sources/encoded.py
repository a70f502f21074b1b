"""A dataset that is encoded already, in a folder of its own, as `train_lora.py export-dataset`
writes it, so that machines without the images can train.

<folder>/encoded.json     {"format": 1, "family", "vae", "text", "options"}: what it was encoded with
<folder>/listing.arrow    names and captions (tables.LISTING)
<folder>/rows.arrow       what is trained on (tables.ROWS)
<folder>/media, text      stores of latents and of conditioning (data/store/store.py)
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.config import DataConfig, SourceConfig
from data.sources.base import Entry, Source
from data.store import tables
from data.store.store import MISSING, Store, damaged

ABOUT = "encoded.json"
FORMAT = 1
OPTIONS = ("vae_sampling", "masks", "random_flip")


def options_of(data: DataConfig) -> dict[str, Any]:
    """What decides which tensors a row has."""
    return {name: getattr(data, name) for name in OPTIONS}


class EncodedSource(Source):
    """A folder that export-dataset wrote."""

    has_images = False

    def __init__(self, config: SourceConfig, data: DataConfig, identities: dict[str, str]):
        """`identities`: hashes of the model's VAE and text encoders."""
        super().__init__(config)
        self.folder, self.data, self.identities = Path(config.path), data, identities
        self.rows: pa.Table | None = None

    def entries(self, faults: list[str]) -> Iterator[Entry]:
        found = self._faults()
        faults += found
        if found:
            return
        listing = tables.mapped(self.folder / "listing.arrow")
        for number, row in tables.rows_of(self._rows()):
            cells = listing.slice(row["entry"], 1).to_pylist()[0]
            repeats = cells["repeats"] * self.config.repeats
            yield Entry(number, cells["name"], cells["captions"], "", repeats)

    def _faults(self) -> list[str]:
        try:
            about = json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))
            wanted = {"format": FORMAT, **self.identities, "options": options_of(self.data)}
            differing = [name for name in wanted if about.get(name) != wanted[name]]
            rows = self._rows()
        except (OSError, ValueError, pa.ArrowException) as error:
            return [f"{self.folder}: not a dataset that export-dataset wrote: {error}"]
        faults = [
            f"{self.folder}: {self._difference(name, about.get(name), wanted[name])}"
            for name in differing
        ]
        for name, column in (("media", "media"), ("text", "texts")):
            broken = [
                f"{part}: damaged; export the dataset again"
                for part in damaged(self.folder / name, ours=False)
            ]
            faults += broken
            lost = (
                0
                if broken
                else Store(self.folder / name).find(tables.keys(rows.column(column))) == MISSING
            )
            faults += (
                [f"{self.folder / name}: {int(np.sum(lost))} of its rows are not there"]
                if np.any(lost)
                else []
            )
        return faults

    def _difference(self, name: str, there: Any, here: Any) -> str:
        what = {
            "vae": "the VAE",
            "text": "the text encoder",
            "family": "the model family",
            "format": "the format",
        }
        if name != "options":
            return f"encoded with another {what[name].removeprefix('the ')} than --model.path has ({there}, not {here})"
        return f"encoded with {there}; this run asks for {here}"

    def _rows(self) -> pa.Table:
        if self.rows is None:
            self.rows = tables.mapped(self.folder / "rows.arrow")
        return self.rows

    def planned(self, row: int) -> dict[str, Any] | None:
        return self._rows().slice(row, 1).to_pylist()[0]
