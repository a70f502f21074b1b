"""All sources of a run: the list of their samples, and the contents of samples."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import DataError
from data.config import DataConfig, SourceConfig
from data.media.video import ClipSampling
from data.precompute.streams import IMAGES_AHEAD, VIDEOS_AHEAD, batched
from data.samples import ListedSample
from data.sources.base import Source
from data.store.tables import ROWS_PER_BATCH, new_table

IndexedSample = tuple[int, ListedSample]
"""Index in the table of listed samples, and the sample."""


class ListedContent(NamedTuple):
    """A listed sample, its index in the table, and its content or the error when it was read."""

    listed: int
    sample: ListedSample
    content: bytes | DataError
    controls: tuple[bytes, ...] = ()
    """The contents of the control images."""


@dataclass(frozen=True)
class RunSources:
    """The sources of a run. Those from `first_held_out` on are for validation."""

    config: DataConfig
    opened: tuple[Source, ...]
    first_held_out: int
    clip_sampling: ClipSampling | None = None
    """The clips of a video that are used; None for models of images."""

    @property
    def num_ahead(self) -> int:
        """Number of samples that are read before they are needed."""
        return IMAGES_AHEAD if self.clip_sampling is None else VIDEOS_AHEAD

    def source_of(self, sample: ListedSample) -> Source:
        return self.opened[sample.source]

    def full_name(self, sample: ListedSample) -> str:
        """Return the name of a sample in messages, with its source if there are several."""
        if len(self.opened) == 1:
            return sample.name
        return f"{self.config_of(sample).path}/{sample.name}"

    def config_of(self, sample: ListedSample) -> SourceConfig:
        return self.opened[sample.source].config

    def have_images(self, source_numbers: np.ndarray) -> np.ndarray:
        """Return whether each of these sources has images, or latents already."""
        has_images = [source.has_images for source in self.opened]
        return np.array(has_images)[source_numbers]

    def write_listing(self, path: Path) -> list[str]:
        """Write the table of all samples of all sources; return the errors of the others."""
        errors: list[str] = []
        with new_table(path, ListedSample) as table:
            for number, source in enumerate(self.opened):
                for sample in source.samples():
                    table.add(replace(sample, source=number))
                errors += source.errors
        return errors

    def contents(self, samples: Iterable[IndexedSample]) -> Iterator[ListedContent]:
        """Yield the contents of listed samples, whose indices ascend.

        Samples of sources without images are skipped."""
        for batch in batched(samples, ROWS_PER_BATCH):
            for number, group in groupby(batch, key=source_number):
                source = self.opened[number]
                if source.has_images:
                    yield from read_contents(source, list(group))


def source_number(indexed_sample: IndexedSample) -> int:
    _, sample = indexed_sample
    return sample.source


def read_contents(source: Source, samples: list[IndexedSample]) -> Iterator[ListedContent]:
    """Yield the contents of samples of one source.

    If the source as a whole fails, all samples that are left have its error."""
    unread = {}
    for index, sample in samples:
        unread[sample.row] = (index, sample)
    own_samples = [sample for _, sample in samples]
    try:
        for sample, content, controls in source.contents(own_samples):
            index, _ = unread.pop(sample.row)
            yield ListedContent(index, sample, content, controls)
    except DataError as error:
        for index, sample in unread.values():
            yield ListedContent(index, sample, error)
