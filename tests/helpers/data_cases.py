"""Encoded data sets for tests, without models: rows with latents and conditioning of numbers that tell them apart."""

from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from data.config import CaptionConfig, CaptionOverrides, DataConfig, SourceConfig
from data.dataset import LatentDataset, Stores
from data.media.buckets import Crop
from data.precompute.index import write_index
from data.store import tables
from data.store.hashing import key_of
from data.store.schema import NONE, Ragged
from data.store.store import Store

Tensors = dict[bytes, dict[str, torch.Tensor]]


def row_of(number: int, **given) -> dict:
    """A row of tables.ROWS."""
    side = given.pop("side", 16)
    return {
        "entry": number, "content": key_of(f"content {number}"), "media": [key_of(f"media {number}")],
        "texts": [key_of(f"caption {number % 2}")], "shares": [1.0], "repeats": 1, "weight": 1.0, "dropout": 0.0,
        "crop": list(astuple(Crop(side, side, side, side, 0, 0, side, side))), "held_out": False, "may_hold_out": True,
        **given,
    }  # fmt: skip


def dataset_of(folder: Path, count: int, rows: list[dict] | None = None) -> LatentDataset:
    """A data set of `count` rows, or of `rows`; latents (4, side / 8, side / 8) are full of the row's number."""
    rows = rows if rows is not None else [row_of(i) for i in range(count)]
    media = {
        key: {
            "latents": torch.full(
                (4, row["crop"][7] // 8, row["crop"][6] // 8), row["entry"] + 0.5 * flip
            )
        }
        for row in rows
        for flip, key in enumerate(row["media"])
    }
    texts = dict.fromkeys([key_of(""), *(text for row in rows for text in row["texts"])])
    conds = {text: {"prompt_embeds": torch.full((3, 5), float(i))} for i, text in enumerate(texts)}
    return dataset_with(folder, rows, media, conds)


def dataset_with(
    folder: Path, rows: list[dict], media: Tensors, texts: Tensors, ragged: Ragged = NONE
) -> LatentDataset:
    """A data set of `rows`, whose media and texts are these tensors."""
    stores = Stores(Store(folder / "media"), Store(folder / "text"), ragged)
    stores.media.write(media.items())
    stores.text.write(texts.items())
    stores.media.reload()
    stores.text.reload()
    with tables.writing(folder / "index" / "listing.arrow", tables.LISTING) as listing:
        for i in range(max(row["entry"] for row in rows) + 1):
            listing.add(
                {name: None for name in tables.LISTING.names}
                | {"name": f"image {i}", "captions": [f"{i}"]}
            )
    table = pa.Table.from_pylist(rows, tables.ROWS)
    write_index(folder / "index", table, np.arange(len(rows)), stores)
    return LatentDataset(folder / "index", stores)


def data_config(**options: Any) -> DataConfig:
    """A DataConfig; `caption_<option>` stands for data.captions.<option>."""
    captions = {name: options.pop(name) for name in list(options) if name.startswith("caption_")}
    own = {name.removeprefix("caption_"): value for name, value in captions.items()}
    return DataConfig(captions=CaptionConfig(**own), **options)


def source_config(path: str, **options: Any) -> SourceConfig:
    """A SourceConfig; `caption_<option>` stands for source.captions.<option>."""
    captions = {name: options.pop(name) for name in list(options) if name.startswith("caption_")}
    own = {name.removeprefix("caption_"): value for name, value in captions.items()}
    return SourceConfig(path, captions=CaptionOverrides(**own), **options)
