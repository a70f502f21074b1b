"""Encoded data sets for tests, without models: latents and conditioning are numbers that tell samples apart."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.process import ProcessInfo
from data.config import CaptionConfig, CaptionOverrides, DataConfig, SourceConfig
from data.dataset import LatentDataset, Stores
from data.media.buckets import Crop
from data.precompute.index import write_index
from data.samples import ListedSample, PlannedSample
from data.store.keys import key_of
from data.store.schema import FIXED_LENGTHS, VariableLengths
from data.store.store import Store
from data.store.tables import Table, new_table

Tensors = dict[bytes, dict[str, torch.Tensor]]
SINGLE_PROCESS = ProcessInfo(0, 1, torch.device("cpu"))


def sample_of(number: int, side: int = 16, **options: Any) -> PlannedSample:
    """A planned sample of a square image."""
    defaults = {
        "content_hash": key_of(f"content {number}"),
        "media_keys": [key_of(f"media {number}")],
        "caption_keys": [key_of(f"caption {number % 2}")],
        "caption_probabilities": [1.0],
        "crop": Crop(side, side, side, side, 0, 0, side, side),
    }
    return PlannedSample(listed=number, **{**defaults, **options})


def dataset_of(
    folder: Path, count: int, samples: list[PlannedSample] | None = None
) -> LatentDataset:
    """A data set of `count` samples, or of `samples`; latents (4, side / 8, side / 8) hold the sample's number."""
    samples = samples if samples is not None else [sample_of(i) for i in range(count)]
    media = {
        key: {
            "latents": torch.full(
                (4, sample.crop.crop_height // 8, sample.crop.crop_width // 8),
                sample.listed + 0.5 * flip,
            )
        }
        for sample in samples
        for flip, key in enumerate(sample.media_keys)
    }
    texts = dict.fromkeys([key_of(""), *(key for sample in samples for key in sample.caption_keys)])
    conds = {text: {"prompt_embeds": torch.full((3, 5), float(i))} for i, text in enumerate(texts)}
    return dataset_with(folder, samples, media, conds)


def dataset_with(
    folder: Path,
    samples: list[PlannedSample],
    media: Tensors,
    texts: Tensors,
    variable_lengths: VariableLengths = FIXED_LENGTHS,
) -> LatentDataset:
    """A data set of `samples`, whose media and texts are these tensors."""
    stores = Stores(Store(folder / "media"), Store(folder / "text"), variable_lengths)
    stores.media.write(media.items())
    stores.text.write(texts.items())
    stores.media.reload()
    stores.text.reload()
    with new_table(folder / "index" / "listed.arrow", ListedSample) as listed:
        for i in range(max(sample.listed for sample in samples) + 1):
            listed.add(ListedSample(row=i, name=f"image {i}", captions=[f"{i}"], stamp=""))
    with new_table(folder / "planned.arrow", PlannedSample) as planned:
        for sample in samples:
            planned.add(sample)
    table = Table(folder / "planned.arrow", PlannedSample)
    write_index(folder / "index", table, np.arange(len(samples)), stores)
    return LatentDataset(folder / "index", stores)


def data_config(**options: Any) -> DataConfig:
    """A DataConfig; `caption_<option>` means data.captions.<option>."""
    captions = {name: options.pop(name) for name in list(options) if name.startswith("caption_")}
    values = {name.removeprefix("caption_"): value for name, value in captions.items()}
    return DataConfig(captions=CaptionConfig(**values), **options)


def source_config(path: str, **options: Any) -> SourceConfig:
    """A SourceConfig; `caption_<option>` means source.captions.<option>."""
    captions = {name: options.pop(name) for name in list(options) if name.startswith("caption_")}
    values = {name.removeprefix("caption_"): value for name, value in captions.items()}
    return SourceConfig(path, captions=CaptionOverrides(**values), **options)
