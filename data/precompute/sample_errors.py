"""Samples that are readable, and that a model does not take, or that have fewer frames than configured."""

from collections.abc import Iterator
from pathlib import Path

from common.errors import counted
from data.media.video import ClipSampling
from data.precompute.facts import FactsCache, MediaFacts, facts_key
from data.precompute.plan import clip_frames
from data.precompute.run_sources import RunSources
from data.samples import ListedSample, PlannedSample
from data.store.tables import Table
from models.base import ModelFamily
from models.limits import PAINTED

MAX_LEVEL = 255


def unsuited_samples(
    sources: RunSources, listed: Table[ListedSample], facts_folder: Path, family: ModelFamily
) -> list[tuple[int, str]]:
    """Return index and error of all samples that are readable, but that the model does not take."""
    errors: list[tuple[int, str]] = []
    frames_error = family.limits.frame_error(1)
    takes_controls = family.controls.max_count > 0
    # the facts of a large data set take long to read, and most models take every sample
    if frames_error is None and not takes_controls and not family.paints_masks:
        return errors
    facts = FactsCache(facts_folder)
    if frames_error is not None:
        errors += still_errors(sources, listed, facts, frames_error)
    if takes_controls:
        errors += control_errors(sources, listed, facts, family)
    if family.paints_masks:
        errors += mask_errors(sources, listed, facts)
    return errors


def readable_samples(
    sources: RunSources, listed: Table[ListedSample], facts: FactsCache
) -> Iterator[tuple[int, ListedSample, MediaFacts]]:
    """Yield index, sample and facts of all images and videos that are readable."""
    has_videos = sources.clip_sampling is not None
    for index, sample in listed.rows():
        source = sources.source_of(sample)
        key = facts_key(sample, has_videos)
        is_readable = source.has_images and key in facts
        if is_readable:
            sample_facts = facts[key]
            yield index, sample, sample_facts


def still_errors(
    sources: RunSources, listed: Table[ListedSample], facts: FactsCache, message: str
) -> list[tuple[int, str]]:
    """Return index and error of all samples that would be trained on as a single frame.

    `message`: the reason why the model does not support that."""
    errors = []
    sampling = sources.clip_sampling
    for index, sample, sample_facts in readable_samples(sources, listed, facts):
        seconds = sample_facts.seconds
        if seconds is None:
            errors.append((index, f"{sample.name}: an image; {message}"))
            continue
        num_frames = 1
        if sampling is not None:
            first_clip = sampling.clips(seconds)[0]
            num_frames = first_clip.frames
        if num_frames == 1:
            errors.append((index, f"{sample.name}: too short; {message}"))
    return errors


def control_errors(
    sources: RunSources, listed: Table[ListedSample], facts: FactsCache, family: ModelFamily
) -> list[tuple[int, str]]:
    """Return index and error of all samples with control images that the model does not take: too many,
    too few, or of a size that its pipeline refuses."""
    errors = []
    for index, sample, sample_facts in readable_samples(sources, listed, facts):
        sizes = sample_facts.control_sizes
        count_error = family.controls.count_error(len(sizes))
        messages = [count_error]
        for width, height in sizes:
            size_error = family.control_error(width, height)
            messages.append(size_error)
        name = sources.full_name(sample)
        for message in messages:
            if message is not None:
                errors.append((index, f"{name}: {message}"))
    return errors


def mask_errors(
    sources: RunSources, listed: Table[ListedSample], facts: FactsCache
) -> list[tuple[int, str]]:
    """Return index and error of all samples whose mask shows nothing to paint."""
    errors = []
    darkest_painted = PAINTED * MAX_LEVEL
    for index, sample, sample_facts in readable_samples(sources, listed, facts):
        if sample_facts.mask_maximum >= darkest_painted:
            continue
        name = sources.full_name(sample)
        message = "its mask is black everywhere; expected white where the model paints"
        errors.append((index, f"{name}: {message}"))
    return errors


def short_videos(
    planned: Table[PlannedSample], listed: Table[ListedSample], sampling: ClipSampling
) -> list[str]:
    """Return the clips that have fewer frames than configured; equal lines are left out."""
    frames = clip_frames(planned)
    is_clip = frames > 0
    has_less = frames < sampling.frames
    is_short = is_clip & has_less
    indices = planned.column("listed")[is_short]
    counts = frames[is_short].tolist()
    fps = sampling.fps
    lines = []
    for (_, sample), count in zip(listed.rows(indices), counts, strict=True):
        frames_of_clip = counted(count, "frame")
        lines.append(f"{sample.name}: {frames_of_clip} at {fps:g} per second")
    return list(dict.fromkeys(lines))
