"""What a source of training data is to the rest: rows with captions, and each row's content when it
is asked for."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common.errors import DataError
from data.config import SourceConfig


@dataclass(frozen=True)
class Entry:
    """A row of a source, without its content.

    `stamp` changes when the content may have changed, as far as can be seen without reading it.
    """

    row: int
    name: str
    captions: list[str]
    stamp: str
    repeats: int = 1
    weight: float = 1.0
    mask: str = ""
    """A mask file's path."""
    width: int = 0
    height: int = 0
    """In pixels, where the rows are latents."""


class Source(ABC):
    """One of the run's sources. Rows are numbered from 0."""

    has_images = True
    """Else its rows are latents and conditioning already."""

    def __init__(self, config: SourceConfig):
        self.config = config

    @abstractmethod
    def entries(self, faults: list[str]) -> Iterator[Entry]:
        """All rows in a fixed order; what is wrong with some is added to `faults`. Opens no image."""

    def contents(self, names: dict[int, str]) -> Iterator[tuple[int, bytes | DataError]]:
        """The files of rows, which ascend, with their names. A DataError stands for one that cannot
        be read."""
        raise NotImplementedError(f"{self.config.path} has no images")

    def planned(self, row: int) -> dict[str, Any] | None:
        """A row of tables.ROWS, where that is known already."""
        return None

    def tensors(self, rows: Iterable[int]) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
        """Latents and conditioning of `rows`, which ascend."""
        raise NotImplementedError(f"{self.config.path} is images")
