"""Samples of a plan. All that the report and the contact sheets read from the tables of a plan
is read here."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from common.errors import DataError
from data.config import DataConfig, SourceConfig
from data.media.buckets import Crop
from data.media.video import Clip
from data.precompute.build import Planned
from data.store import tables
from data.store.store import MISSING
from tools.tables import one_line

MAX_NAME_LENGTH = 200


@dataclass(slots=True)
class PlannedSample:
    """An image, a clip or stored latents, with its crop and its captions."""

    listed: int
    """Index of its row in the listing; all clips of a video have the same."""
    media_keys: list[bytes]
    caption_keys: list[bytes]
    crop: Crop
    clip: Clip | None
    repeats: int
    weight: float
    is_held_out: bool
    """Belongs to the validation images of a source."""


@dataclass(slots=True)
class ListedSample:
    """A row of a source."""

    source: int
    """Number of the source among the sources of the run."""
    row: int
    """Number of the row in its source."""
    name: str
    captions: list[str]
    cells: dict[str, Any]


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

    def __init__(self, plan: Planned, held_out_indices: np.ndarray):
        """`held_out_indices`: of the samples that are not trained on."""
        self.work = plan.work
        self.rows = self.work.rows
        self.media_store = plan.stores.media
        self.sources = self.work.planner.sources
        self.source_configs = [source.config for source in self.sources.opened]
        self.is_held_out = np.zeros(len(self.rows), bool)
        self.is_held_out[held_out_indices] = True

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def config(self) -> DataConfig:
        return self.work.config

    @property
    def first_validation_source(self) -> int:
        """Return the number of the first source of validation images."""
        return self.sources.held_out_from

    def all(self) -> Iterator[Sample]:
        """Yield all samples in their order, which is also the order of the listing."""
        listing = tables.rows_of(self.work.listing)
        listed_index = -1
        cells: dict[str, Any] = {}
        for index, row in tables.rows_of(self.rows):
            while listed_index < row["entry"]:
                listed_index, cells = next(listing)
            yield make_sample(index, row, cells)

    def at(self, indices: np.ndarray) -> Iterator[Sample]:
        """Yield the samples with these indices.

        IN: (n,), int64, in any order."""
        rows = self.work.cells(indices)
        for index, row_and_cells in zip(indices.tolist(), rows, strict=True):
            row, cells = row_and_cells
            yield make_sample(index, row, cells)

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
        sizes = [np.empty((0, 2), np.int32)]
        for chunk in self.rows.column("crop").chunks:
            numbers = chunk.flatten().to_numpy()
            crops = numbers.reshape(-1, 8)
            sizes.append(crops[:, 6:])
        return np.concatenate(sizes)

    def content_hashes(self) -> np.ndarray:
        """Return the hash of each sample's file."""
        return tables.keys(self.rows.column("content"))

    def first_of_files(self) -> np.ndarray:
        """Return the index of the first sample of each file: of a video, the first clip."""
        listed = self.rows.column("entry").to_numpy()
        _, first_indices = np.unique(listed, return_index=True)
        return first_indices

    def have_images(self) -> np.ndarray:
        """Return for each sample whether it is an image or a clip, and not latents of the
        source."""
        return self.work.has_images()

    def have_latents(self) -> np.ndarray:
        """Return for each sample whether its latents are stored, or are in the source.

        OUT: (samples,), bool."""
        media = self.rows.column("media")
        first_positions = tables.starts(tables.lengths(media))
        first_keys = tables.keys(media)[first_positions]
        is_stored = self.media_store.find(first_keys) != MISSING
        return is_stored | ~self.have_images()

    def read_contents(self, samples: list[Sample]) -> Iterator[FileContent]:
        """Yield the content of each file once. `samples`: in ascending order."""
        samples_of_file: dict[int, list[Sample]] = {}
        listing = []
        for sample in samples:
            file_index = sample.planned.listed
            cells = {**sample.listed.cells, "entry": file_index}
            listing.append(cells)
            file_samples = samples_of_file.setdefault(file_index, [])
            file_samples.append(sample)
        for cells, content in self.sources.contents(listing):
            file_index = cells["entry"]
            yield FileContent(samples_of_file[file_index], content)

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
                    row = sample.listed.row
                    sample_of_row[row] = sample
            if not sample_of_row:
                continue
            rows = sorted(sample_of_row)
            for row, latents, _ in source.tensors(rows):
                yield sample_of_row[row], latents


def make_sample(index: int, row: dict[str, Any], cells: dict[str, Any]) -> Sample:
    """Return a sample from a row of the plan and its row in the listing."""
    planned = PlannedSample(
        listed=row["entry"],
        media_keys=row["media"],
        caption_keys=row["texts"],
        crop=Crop(*row["crop"]),
        clip=Clip.of(row["clip"]) if row["clip"] else None,
        repeats=row["repeats"],
        weight=row["weight"],
        is_held_out=row["held_out"],
    )
    listed = ListedSample(
        source=cells["source"],
        row=cells["row"],
        name=cells["name"],
        captions=cells["captions"],
        cells=cells,
    )
    return Sample(index, planned, listed)
