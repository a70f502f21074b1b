"""Samples of a plan. All that the report and the contact sheets read from the tables of a plan
is read here."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from common.errors import DataError
from common.text import one_line
from data.config import DataConfig, SourceConfig
from data.precompute.build import DataPlan
from data.samples import ListedSample, PlannedSample
from data.store.store import MISSING
from data.store.tables import list_starts

MAX_NAME_LENGTH = 200


@dataclass(slots=True)
class Sample:
    """A sample of a plan, with its index in the plan."""

    index: int
    planned: PlannedSample
    listed: ListedSample

    @property
    def bucket_size(self) -> tuple[int, int]:
        """Return width and height of the bucket in pixels."""
        crop = self.planned.crop
        return crop.crop_width, crop.crop_height

    @property
    def num_frames(self) -> int:
        return 1 if self.planned.clip is None else self.planned.clip.frames


class FileContent(NamedTuple):
    """The content of a file, or the reason why it is not readable, and the samples in it."""

    samples: list[Sample]
    content: bytes | DataError


class PlanSamples:
    """The samples of a plan, read a few at a time."""

    def __init__(self, plan: DataPlan, held_out_indices: np.ndarray):
        """`held_out_indices`: of the samples that are not trained on."""
        self.job = plan.job
        self.table = plan.job.planned
        self.media_store = plan.stores.media
        self.sources = self.job.planner.sources
        self.source_configs = [source.config for source in self.sources.opened]
        self.is_held_out = np.zeros(len(self.table), bool)
        self.is_held_out[held_out_indices] = True

    def __len__(self) -> int:
        return len(self.table)

    @property
    def config(self) -> DataConfig:
        return self.job.config

    @property
    def first_validation_source(self) -> int:
        """Return the number of the first source of validation images."""
        return self.sources.first_held_out

    def all(self) -> Iterator[Sample]:
        """Yield all samples in their order, which is also the order of the listing."""
        listing = self.job.listed.rows()
        listed_index = -1
        for index, planned in self.table.rows():
            while listed_index < planned.listed:
                listed_index, listed = next(listing)
            yield Sample(index, planned, listed)

    def at(self, indices: np.ndarray) -> Iterator[Sample]:
        """Yield the samples with these indices.

        IN: (n,), int64, in any order."""
        samples = self.job.samples(indices)
        for index, (planned, listed) in zip(indices.tolist(), samples, strict=True):
            yield Sample(index, planned, listed)

    def source_config(self, sample: Sample) -> SourceConfig:
        return self.source_configs[sample.listed.source]

    def name(self, sample: Sample) -> str:
        """Return the name of a sample, with its source if there are several."""
        name = one_line(sample.listed.name, MAX_NAME_LENGTH)
        if len(self.source_configs) == 1:
            return name
        folder = self.source_config(sample).path
        return f"{folder}/{name}"

    def label(self, sample: Sample) -> str:
        """Return the name of a sample, with a mark if it is held out."""
        label = self.name(sample)
        if self.is_held_out[sample.index]:
            label += " (held out)"
        return label

    def bucket_sizes(self) -> np.ndarray:
        """Return width and height of the bucket of each sample.

        OUT: (samples, 2), in pixels."""
        widths = self.table.nested_column("crop", "crop_width")
        heights = self.table.nested_column("crop", "crop_height")
        return np.column_stack([widths, heights])

    def content_hashes(self) -> np.ndarray:
        """Return the hash of each sample's file."""
        return self.table.keys("content_hash")

    def first_of_files(self) -> np.ndarray:
        """Return the index of the first sample of each file: of a video, the first clip."""
        listed = self.table.column("listed")
        _, first_indices = np.unique(listed, return_index=True)
        return first_indices

    def have_images(self) -> np.ndarray:
        """Return for each sample whether it is an image or a clip, and not latents of the
        source."""
        return self.job.have_images()

    def have_latents(self) -> np.ndarray:
        """Return for each sample whether its latents are stored, or are in the source.

        OUT: (samples,), bool."""
        first_positions = list_starts(self.table.lengths("media_keys"))
        first_keys = self.table.keys("media_keys")[first_positions]
        is_stored = self.media_store.find(first_keys) != MISSING
        return is_stored | ~self.have_images()

    def read_contents(self, samples: list[Sample]) -> Iterator[FileContent]:
        """Yield the content of each file once. `samples`: in ascending order."""
        samples_of_file: dict[int, list[Sample]] = {}
        listed: dict[int, ListedSample] = {}
        for sample in samples:
            file_index = sample.planned.listed
            listed[file_index] = sample.listed
            file_samples = samples_of_file.setdefault(file_index, [])
            file_samples.append(sample)
        for file in self.sources.contents(listed.items()):
            yield FileContent(samples_of_file[file.listed], file.content)

    def read_latents(self, samples: list[Sample]) -> Iterator[tuple[Sample, Tensor]]:
        """Yield the latents of each sample: first those in the store, then those of the sources."""
        unstored_samples = []
        for sample in samples:
            key = sample.planned.media_keys[0]
            if key in self.media_store:
                row = self.media_store[key]
                yield sample, row["latents"]
            else:
                unstored_samples.append(sample)
        yield from self._read_source_latents(unstored_samples)

    def _read_source_latents(self, samples: list[Sample]) -> Iterator[tuple[Sample, Tensor]]:
        """Yield the latents of samples, source by source. Each source is read once, in its
        order."""
        for number, source in enumerate(self.sources.opened):
            sample_of_row: dict[int, Sample] = {}
            for sample in samples:
                if sample.listed.source == number:
                    sample_of_row[sample.listed.row] = sample
            if not sample_of_row:
                continue
            rows = sorted(sample_of_row)
            listed = [sample_of_row[row].listed for row in rows]
            for listed_sample, latents, _ in source.tensors(listed):
                yield sample_of_row[listed_sample.row], latents
