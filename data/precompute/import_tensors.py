"""Latents and conditioning that sources have already, copied to the stores."""

from collections.abc import Iterator

import torch

from data.dataset import Stores
from data.precompute.encode import EncodeJob
from data.samples import ListedSample, PlannedSample
from data.sources.base import SampleTensors


def import_tensors(job: EncodeJob, stores: Stores) -> None:
    """Copy this process's share of the tensors that the stores lack."""
    with stores.media.writer() as media, stores.text.writer() as text:
        for planned, (_, latents, cond) in unstored_tensors(job, stores):
            media_tensors = {"latents": latents}
            if job.config.vae_sampling == "sample":
                media_tensors["deviation"] = torch.zeros_like(latents)
            if job.config.masks != "none":
                size = latents.shape[-2:]
                media_tensors["mask"] = torch.ones(size)
            text_tensors = dict(cond)
            for name in job.family.media_cond:
                media_tensors[name] = text_tensors.pop(name)
            media.add(planned.media_keys[0], media_tensors)
            text.add(planned.caption_keys[0], text_tensors)


def unstored_tensors(
    job: EncodeJob, stores: Stores
) -> Iterator[tuple[PlannedSample, SampleTensors]]:
    """Yield the planned samples of this process's share whose tensors the stores lack."""
    sources = job.planner.sources.opened
    if all(source.has_images for source in sources):
        return
    for indices in job.own_blocks():
        planned_of: dict[int, dict[int, PlannedSample]] = {}
        listed_of: dict[int, list[ListedSample]] = {}
        for planned, listed in job.samples(indices):
            source = sources[listed.source]
            if source.has_images or source.is_planned or is_stored(planned, stores):
                continue
            planned_of.setdefault(listed.source, {})[listed.row] = planned
            listed_of.setdefault(listed.source, []).append(listed)
        for number, listed_samples in listed_of.items():
            for tensors in sources[number].tensors(listed_samples):
                yield planned_of[number][tensors.sample.row], tensors


def is_stored(planned: PlannedSample, stores: Stores) -> bool:
    """Return whether the stores have the latents and the first caption of a sample."""
    has_media = planned.media_keys[0] in stores.media
    has_text = planned.caption_keys[0] in stores.text
    return has_media and has_text
