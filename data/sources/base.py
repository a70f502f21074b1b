"""The interface of a source of training data: rows with captions, and the content of each row."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from common.errors import DataError
from data.config import SourceConfig
from data.samples import ListedSample, PlannedSample


class SampleContent(NamedTuple):
    """A sample, and the content of its file, or the error that occurred when it was read."""

    sample: ListedSample
    content: bytes | DataError
    controls: tuple[bytes, ...] = ()
    """The contents of the control images."""


class SampleTensors(NamedTuple):
    """A sample with raw latents (C, [F,] h, w) and conditioning as the family's encode_prompt
    makes it."""

    sample: ListedSample
    latents: Tensor
    cond: dict[str, Tensor]


class Source(ABC):
    """One of the sources of a run. Its rows are numbered from 0."""

    has_images = True
    """Rows are images or videos; otherwise they are latents and conditioning."""
    is_planned = False
    """Rows are planned already, and their latents and conditioning are in stores."""

    def __init__(self, config: SourceConfig):
        self.config = config
        self.errors: list[str] = []
        """Errors that `samples` has met so far."""

    @abstractmethod
    def samples(self) -> Iterator[ListedSample]:
        """Yield all usable rows in a fixed order, and add the errors of the others to `errors`.

        Opens no image."""

    def contents(self, samples: Iterable[ListedSample]) -> Iterator[SampleContent]:
        """Yield the content of rows, whose numbers ascend."""
        raise NotImplementedError(f"{self.config.path} has no images")

    def planned(self, row: int) -> PlannedSample:
        """Return the plan of a row, if the source is planned."""
        raise NotImplementedError(f"{self.config.path} is not planned")

    def tensors(self, samples: Iterable[ListedSample]) -> Iterator[SampleTensors]:
        """Yield latents and conditioning of rows, whose numbers ascend."""
        raise NotImplementedError(f"{self.config.path} has images, not tensors")
