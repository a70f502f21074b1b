"""Latents and conditioning that sources have already, copied to the stores."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.dataset import Stores
from data.precompute.encode import EncodeJob
from data.samples import ListedSample, PlannedSample

Tensors = dict[str, Tensor]


class ImportedSample(NamedTuple):
    """A planned sample, and its raw latents and conditioning."""

    planned: PlannedSample
    latents: Tensor
    cond: Tensors


def import_tensors(job: EncodeJob, stores: Stores) -> None:
    """Copy this process's share of the tensors that the stores lack.

    All processes write to the same stores, in separate shards."""
    sources = job.planner.sources.opened
    if all(source.has_images for source in sources):
        return
    with stores.media.writer() as media, stores.text.writer() as text:
        for indices in job.own_blocks():
            for sample in unstored_samples(job, stores, indices):
                media_key = sample.planned.media_keys[0]
                caption_key = sample.planned.caption_keys[0]
                media_tensors, text_tensors = split_tensors(job, sample)
                media.add(media_key, media_tensors)
                text.add(caption_key, text_tensors)


def unstored_samples(
    job: EncodeJob, stores: Stores, indices: np.ndarray
) -> Iterator[ImportedSample]:
    """Yield the samples of a block that the stores lack, source by source."""
    sources = job.planner.sources.opened
    planned_of_row: dict[tuple[int, int], PlannedSample] = {}
    unstored: dict[int, list[ListedSample]] = {}
    for planned, listed in job.samples(indices):
        source = sources[listed.source]
        if source.has_images or source.is_planned or is_stored(planned, stores):
            continue
        planned_of_row[listed.source, listed.row] = planned
        unstored.setdefault(listed.source, []).append(listed)
    for number, listed_samples in unstored.items():
        for tensors in sources[number].tensors(listed_samples):
            planned = planned_of_row[number, tensors.sample.row]
            yield ImportedSample(planned, tensors.latents, tensors.cond)


def is_stored(planned: PlannedSample, stores: Stores) -> bool:
    """Return whether the stores have the latents and the conditioning of a sample.

    Its orientations and captions have the same keys, so the first one is enough."""
    media_key = planned.media_keys[0]
    caption_key = planned.caption_keys[0]
    return media_key in stores.media and caption_key in stores.text


def split_tensors(job: EncodeJob, sample: ImportedSample) -> tuple[Tensors, Tensors]:
    """Return the tensors of a sample for the media store, and those for the text store.

    If a run stores deviations or masks, the latents have a deviation of zero, and the mask counts
    everywhere."""
    config = job.config
    latents = sample.latents
    media_tensors = {"latents": latents}
    if config.vae_sampling == "sample":
        media_tensors["deviation"] = torch.zeros_like(latents)
    if config.masks != "none":
        height, width = latents.shape[-2:]
        media_tensors["mask"] = torch.ones(height, width)
    text_tensors = dict(sample.cond)
    for name in job.family.sample_conditioning:
        media_tensors[name] = text_tensors.pop(name)
    return media_tensors, text_tensors
