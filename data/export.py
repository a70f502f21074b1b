"""Writes the encoded data of a run as a folder of its own: ours, which other machines train from
without the images, or ComfyUI's."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from common.errors import DataError
from data.precompute.build import Build, Datasets
from data.sources import comfy_shards
from data.sources.encoded import ABOUT, FORMAT, options_of
from data.store import tables
from data.store.store import Store
from models.base import ModelFamily
from models.latents import with_frame_axis

Form = Literal["encoded", "comfyui", "safetensors"]


def write_dataset(build: Build, built: Datasets, folder: Path, form: Form) -> int:
    """Writes all that `built` is trained and validated on; returns how many rows. DataError if
    `folder` is there.

    "encoded" keeps everything; the other two, which ComfyUI reads or might, keep each row once with
    its first caption.
    """
    if os.path.lexists(folder):
        raise DataError(f"{folder} is there already; name another")
    if form == "encoded":
        return write_encoded(build, built, folder)
    samples = comfy_samples(build.family, built)
    return comfy_shards.write_folder(
        folder, samples, form="pkl" if form == "comfyui" else "safetensors"
    )


def write_encoded(build: Build, built: Datasets, folder: Path) -> int:
    rows = tables.mapped(build.rows)
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)  # left by a process that was killed here
    try:
        beside.mkdir(parents=True)
        shutil.copy(build.rows, beside / "rows.arrow")
        shutil.copy(build.listing, beside / "listing.arrow")
        for store, column in ((built.train.media, "media"), (built.train.text, "texts")):
            wanted = np.unique(tables.keys(rows.column(column)))
            whole = Store(
                store.folder, store.also
            )  # which finds by key; that of a run no longer does
            Store(beside / ("media" if column == "media" else "text")).write(copied(whole, wanted))
        about = {"format": FORMAT, **build.identities, "options": options_of(build.config)}
        (beside / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
        beside.rename(folder)
    except OSError as error:
        raise DataError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # it has its name by now, if it is whole
    return len(rows)


def copied(store: Store, keys: np.ndarray) -> Iterator[tuple[bytes, dict[str, Tensor]]]:
    yield from (
        (key, store.row(int(place)))
        for key, place in zip(keys.tolist(), store.find(keys), strict=True)
    )


def comfy_samples(
    family: ModelFamily, built: Datasets
) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    for dataset in filter(None, (built.train, built.validation)):
        for row in range(len(dataset)):
            latents = with_frame_axis(dataset.latents(row)[None], family.comfy.has_frame_axis)[0]
            yield latents, *family.comfy.write(dataset.cond(row))
