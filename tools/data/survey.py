"""Counts over the samples of a plan, in one pass. Only the names of a few samples are kept."""

import heapq
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data.plan_samples import PlanSamples, Sample
from models.base import ModelFamily
from tools.data.caption_survey import CaptionSurvey
from tools.data.counts import MAX_NAMES, NameList, ValueRange

MAX_COPIES = 5
"""Copies of one file that are named."""


@dataclass
class SourceCounts:
    """Counts over the samples of a source."""

    num_samples: int = 0
    num_held_out: int = 0
    num_captions: int = 0
    visits: int = 0
    """Number of times that the samples are seen per epoch."""
    repeats: ValueRange = field(default_factory=ValueRange)
    weight: ValueRange = field(default_factory=ValueRange)


@dataclass
class BucketCounts:
    """Counts over the samples of one size and number of frames."""

    num_samples: int = 0
    num_held_out: int = 0
    visits: int = 0
    cropped: ValueRange = field(default_factory=ValueRange)
    """Share of the scaled image that is outside of the bucket."""


class Bucket(NamedTuple):
    """Size in pixels and number of frames."""

    width: int
    height: int
    num_frames: int

    def __str__(self) -> str:
        frames = f", {self.num_frames} frames" if self.num_frames > 1 else ""
        return f"{self.width} x {self.height}{frames}"


class Enlargement(NamedTuple):
    """An image that is smaller than its bucket. Tuples sort by factor, then by the order of
    images."""

    factor: float
    negative_index: int
    line: str


class EnlargedImages:
    """Images that are smaller than their buckets: their number, and the most enlarged ones."""

    def __init__(self) -> None:
        self.count = 0
        self.heap: list[Enlargement] = []

    def add(self, index: int, factor: float, line: str) -> None:
        """Add the image with an index in the plan. `line`: describes it."""
        self.count += 1
        heapq.heappush(self.heap, Enlargement(factor, -index, line))
        if len(self.heap) > MAX_NAMES:
            heapq.heappop(self.heap)

    def names(self) -> NameList:
        """Return the most enlarged images, the largest factor first."""
        most_enlarged = sorted(self.heap, reverse=True)
        lines = [image.line for image in most_enlarged]
        return NameList(self.count, lines)


class Survey:
    """All counts of a plan."""

    def __init__(self, samples: PlanSamples, family: ModelFamily, trigger_words: str):
        """`trigger_words`: those of export.trigger_words."""
        self.samples = samples
        self.sources = [SourceCounts() for _ in samples.source_configs]
        self.buckets: dict[Bucket, BucketCounts] = {}
        self.captions = CaptionSurvey(family, trigger_words)
        self.caption_variants = ValueRange()
        """Numbers of variants of each sample's captions."""
        self.enlarged = EnlargedImages()
        listed_index = -1
        for sample in samples.all():
            self._add_counts(sample)
            self._add_if_enlarged(sample)
            if sample.planned.listed != listed_index:  # clips of one video share their captions
                self._add_captions(sample)
            listed_index = sample.planned.listed
        self.captions.count_tokens()

    def _add_counts(self, sample: Sample) -> None:
        source = self.sources[sample.listed.source]
        bucket = self._bucket(sample)
        planned = sample.planned
        is_held_out = bool(self.samples.is_held_out[sample.index])
        for counts in (source, bucket):
            counts.num_samples += 1
            if is_held_out:
                counts.num_held_out += 1
            else:
                counts.visits += planned.repeats
        source.repeats.add(planned.repeats)
        source.weight.add(round(planned.weight, 4))
        bucket.cropped.add(cropped_share(sample))
        self.caption_variants.add(len(planned.caption_keys))

    def _bucket(self, sample: Sample) -> BucketCounts:
        """Return the counts of the bucket of a sample."""
        width, height = sample.bucket_size
        bucket = Bucket(width, height, sample.num_frames)
        counts = self.buckets.get(bucket)
        if counts is None:
            counts = BucketCounts()
            self.buckets[bucket] = counts
        return counts

    def _add_if_enlarged(self, sample: Sample) -> None:
        """Note an image that is smaller than its bucket."""
        factor = enlargement_factor(sample)
        if factor > 1:
            name = self.samples.name(sample)
            crop = sample.planned.crop
            line = f"{name}  {crop.width}x{crop.height}, x {factor:.2f}"
            self.enlarged.add(sample.index, factor, line)

    def _add_captions(self, sample: Sample) -> None:
        source_counts = self.sources[sample.listed.source]
        source_counts.num_captions += len(sample.listed.captions)
        self.captions.add(
            sample,
            name=self.samples.name(sample),
            source=self.samples.source_config(sample),
        )


def enlargement_factor(sample: Sample) -> float:
    """Return the largest factor by which a side of the image is scaled."""
    crop = sample.planned.crop
    horizontal_factor = crop.crop_width / crop.width
    vertical_factor = crop.crop_height / crop.height
    return max(horizontal_factor, vertical_factor)


def cropped_share(sample: Sample) -> float:
    """Return the share of the scaled image that is outside of the bucket."""
    crop = sample.planned.crop
    bucket_area = crop.crop_width * crop.crop_height
    scaled_area = crop.scaled_width * crop.scaled_height
    return 1 - bucket_area / scaled_area


def find_copies(samples: PlanSamples) -> NameList:
    """Return the groups of files with the same content, a line for each group."""
    indices = samples.first_of_files()
    hashes = samples.content_hashes()[indices]
    order = np.argsort(hashes, kind="stable")
    starts, ends = runs_of_equal(hashes[order])
    first_files = order[starts]
    groups = NameList(len(starts))
    for number in np.argsort(first_files, kind="stable")[:MAX_NAMES]:
        start = starts[number]
        end = ends[number]
        group = indices[order[start:end]]
        line = describe_copies(samples, group)
        groups.names.append(line)
    return groups


def runs_of_equal(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the starts and the ends of runs of at least two equal values.

    IN: values in sorted order."""
    equals_previous = np.zeros(len(values) + 1, np.int8)
    equals_previous[1:-1] = values[1:] == values[:-1]
    changes = np.diff(equals_previous)
    starts = np.flatnonzero(changes == 1)
    ends = np.flatnonzero(changes == -1) + 1
    return starts, ends


def describe_copies(samples: PlanSamples, indices: np.ndarray) -> str:
    """Return the names of samples with the same content."""
    names = []
    for sample in samples.at(indices[:MAX_COPIES]):
        name = samples.label(sample)
        names.append(name)
    num_unnamed = len(indices) - len(names)
    if num_unnamed:
        names.append(f"... and {num_unnamed} more")
    return " = ".join(names)
