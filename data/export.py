"""Encoded data of a run, written to a separate folder.

The folder has the trainer's own form, from which other machines train without the images, or
ComfyUI's form.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from common.atomic import WriteError, new_folder
from common.errors import DataError
from data.precompute.build import DatasetBuilder, Datasets
from data.sources.comfy_writer import check_is_new, write_folder
from data.sources.encoded import (
    DESCRIPTION,
    LISTED_TABLE,
    PLANNED_TABLE,
    STORES,
    describe_encoding,
)
from data.store.keys import full_key
from data.store.store import Store
from models.base import ModelFamily, with_frames

ExportForm = Literal["encoded", "comfyui", "safetensors"]


def write_dataset(
    builder: DatasetBuilder, datasets: Datasets, folder: Path, form: ExportForm
) -> int:
    """Write everything that a run trains and validates on; return the number of samples.

    "encoded" keeps everything. The other forms, for ComfyUI, keep each sample once with its first
    caption. Raises DataError if `folder` exists."""
    check_is_new(folder)
    if form == "encoded":
        return write_encoded(builder, datasets, folder)
    samples = comfy_samples(builder.family, datasets)
    return write_folder(folder, samples, form="pkl" if form == "comfyui" else "safetensors")


def write_encoded(builder: DatasetBuilder, datasets: Datasets, folder: Path) -> int:
    """Write the tables of the plan, and stores with all rows that it needs."""
    planned = builder.open_planned()
    stores = {"media": datasets.train.media, "text": datasets.train.text}
    description = describe_encoding(builder.config, builder.component_hashes)
    try:
        with new_folder(folder) as partial_path:
            shutil.copy(planned.path, partial_path / PLANNED_TABLE)
            shutil.copy(builder.listed_path, partial_path / LISTED_TABLE)
            for name, column in STORES.items():
                keys = np.unique(planned.keys(column))
                rows = read_rows(stores[name], keys)
                exported_store = Store(partial_path / name)
                exported_store.write(rows)
            text = json.dumps(description, indent=1)
            (partial_path / DESCRIPTION).write_text(text, encoding="utf-8")
            check_is_new(folder)
    except WriteError as error:
        raise DataError(str(error)) from error
    return len(planned)


def read_rows(run_store: Store, keys: np.ndarray) -> Iterator[tuple[bytes, dict[str, Tensor]]]:
    """Yield the rows with these keys.

    The store is opened again, because the store of a dataset does not keep its keys."""
    store = Store(run_store.folder, run_store.other_folders)
    row_ids = store.find(keys)
    for key, row_id in zip(keys.tolist(), row_ids.tolist(), strict=True):
        tensors = store.read_row(row_id)
        yield full_key(key), tensors


def comfy_samples(
    family: ModelFamily, datasets: Datasets
) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Yield latents, cond and extras of each sample, as ComfyUI has them."""
    has_frames = family.comfy_frames or family.media != "image"
    for dataset in (datasets.train, datasets.validation):
        if dataset is None:
            continue
        for row in range(len(dataset)):
            latents = dataset.latents(row)
            batch = with_frames(latents[None], has_frames)
            cond, extras = family.cond_to_comfy(dataset.cond(row))
            yield batch[0], cond, extras
