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
from models.base import ModelFamily
from models.latents import with_frame_axis

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
    """Write the tables of the plan, and stores with all rows that it needs.

    Raises DataError if something cannot be written."""
    planned = builder.open_planned()
    train = datasets.train
    stores = {"media": train.media, "text": train.text}
    description = describe_encoding(builder.config, builder.component_hashes)
    try:
        with new_folder(folder) as partial_path:
            shutil.copy(planned.path, partial_path / PLANNED_TABLE)
            shutil.copy(builder.listed_path, partial_path / LISTED_TABLE)
            for name, column in STORES.items():
                keys = planned.keys(column)
                copy_rows(stores[name], Store(partial_path / name), keys)
            text = json.dumps(description, indent=1)
            path = partial_path / DESCRIPTION
            path.write_text(text, encoding="utf-8")
            check_is_new(folder)
    except WriteError as error:
        raise DataError(str(error)) from error
    return len(planned)


def copy_rows(source: Store, target: Store, keys: np.ndarray) -> None:
    """Copy each row with one of these keys once.

    The source is opened again, because the store of a dataset does not keep its keys."""
    store = Store(source.folder, source.other_folders)
    different_keys = np.unique(keys)
    row_ids = store.find(different_keys).tolist()
    with target.writer() as writer:
        for key, row_id in zip(different_keys.tolist(), row_ids, strict=True):
            tensors = store.read_row(row_id)
            writer.add(full_key(key), tensors)


def comfy_samples(
    family: ModelFamily, datasets: Datasets
) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Yield latents, cond and extras of each sample, as ComfyUI has them.

    Validation samples follow the training samples."""
    has_frames = family.comfy.has_frame_axis
    for dataset in (datasets.train, datasets.validation):
        if dataset is None:
            continue
        for row in range(len(dataset)):
            batch = dataset.latents(row)[None]
            batch = with_frame_axis(batch, has_frames)
            sample_cond = dataset.cond(row)
            cond, extras = family.comfy.write(sample_cond)
            yield batch[0], cond, extras
