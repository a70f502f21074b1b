"""Counts what a run would be trained on, row by row over the tables of the plan: of the rows, only
a few are kept."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np

from data.config import SourceConfig
from data.media.captions import trigger_of, with_trigger
from data.precompute.build import DataPlan
from data.precompute.encode import EncodeJob
from data.samples import ListedSample, PlannedSample
from data.sources import detect_kind
from data.store.tables import Table
from models.base import ModelFamily

MOST_NAMED = 10
MOST_ALIKE = 5
TOKENISED_TOGETHER = 1000


@dataclass
class Named:
    """How many there are, and what the first of them are called."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str, times: int = 1) -> None:
        self.count += times
        if len(self.first) < MOST_NAMED:
            self.first.append(name)

    def lines(self) -> list[str]:
        more = self.count - len(self.first)
        return [*self.first, *([f"... and {more} more"] if more else [])]


@dataclass
class Span:
    """Least, most and mean of numbers that are not kept."""

    least: float = float("inf")
    most: float = float("-inf")
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.least, self.most = min(self.least, value), max(self.most, value)
        self.total, self.count = self.total + value, self.count + 1

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def __str__(self) -> str:
        if not self.count:
            return "-"
        return f"{self.least:g}" if self.least == self.most else f"{self.least:g} to {self.most:g}"


@dataclass
class SourceCounts:
    """What one source gives."""

    images: int = 0
    held_out: int = 0
    captions: int = 0
    visits: int = 0
    repeats: Span = field(default_factory=Span)
    weight: Span = field(default_factory=Span)


@dataclass
class BucketCounts:
    """The images of one size and number of frames; `cropped`: which share of the scaled image is
    not seen."""

    images: int = 0
    held_out: int = 0
    visits: int = 0
    cropped: Span = field(default_factory=Span)


@dataclass
class Captions:
    """What is odd about the captions, each with its trigger where the run puts that before it."""

    hashes: bytearray = field(default_factory=bytearray)
    tokens: Span = field(default_factory=Span)
    limit: int = 0
    over: Named = field(default_factory=Named)
    empty: Named = field(default_factory=Named)
    given_trigger: dict[str, Named] = field(default_factory=dict)
    """Trigger -> captions that do not have it, and that the run puts it before."""
    without_trigger: Named = field(default_factory=Named)
    """Captions in which what the adapter's file names as its trigger is not."""

    @property
    def distinct(self) -> int:
        return len(np.unique(np.frombuffer(self.hashes, "<u8")))


class Survey:
    """One pass over `planned`; `held_out`: rows that are not trained on, `trigger`:
    export.trigger_words."""

    def __init__(self, planned: DataPlan, held_out: np.ndarray, family: ModelFamily, trigger: str):
        self.work, self.family, self.trigger = planned.job, family, trigger
        self.held_out = np.zeros(len(planned.job.planned), bool)
        self.held_out[held_out] = True
        self.sources = [SourceCounts() for _ in self.work.planner.sources.opened]
        self.buckets: dict[tuple[int, int, int], BucketCounts] = {}
        self.captions = Captions()
        self.variants = Span()
        self.enlarged = 0
        self.most_enlarged: list[tuple[float, int, str]] = []
        self._waiting: dict[str, list[str]] = {}
        entry = -1
        for number, row, cells in pairs(self.work):
            self._add(number, row, cells)
            if row.listed != entry:  # clips of one video share their captions
                self._add_captions(row, cells)
            entry = row.listed
        self._tokenise()
        self.most_enlarged.sort(reverse=True)

    def name(self, cells: ListedSample) -> str:
        """What an image is called: with its source, if there are several."""
        return name_of(self.work, cells)

    def _add(self, number: int, row: PlannedSample, cells: ListedSample) -> None:
        crop, source = row.crop, self.sources[cells.source]
        frames = row.clip.frames if row.clip else 1
        bucket = self.buckets.setdefault(
            (crop.crop_width, crop.crop_height, frames), BucketCounts()
        )
        visits = 0 if self.held_out[number] else row.repeats
        for counts in (source, bucket):
            counts.images += 1
            counts.held_out += bool(self.held_out[number])
            counts.visits += visits
        source.repeats.add(row.repeats)
        source.weight.add(round(row.weight, 4))
        bucket.cropped.add(
            1 - crop.crop_width * crop.crop_height / (crop.scaled_width * crop.scaled_height)
        )
        self.variants.add(len(row.caption_keys))
        factor = max(crop.crop_width / crop.width, crop.crop_height / crop.height)
        if factor > 1:
            self.enlarged += 1
            said = f"{self.name(cells)}  {crop.width}x{crop.height}, x {factor:.2f}"
            heapq.heappush(self.most_enlarged, (factor, -number, said))
            if len(self.most_enlarged) > MOST_NAMED:
                heapq.heappop(self.most_enlarged)

    def _add_captions(self, row: PlannedSample, cells: ListedSample) -> None:
        source, name, found = self._config(cells), self.name(cells), self.captions
        self.sources[cells.source].captions += len(cells.captions)
        for given in cells.captions:
            found.hashes += blake2b(given.encode(), digest_size=8).digest()
            caption = with_trigger(given, source)
            if not given.strip():
                found.empty.add(name)
            if caption != given and not row.is_held_out:
                found.given_trigger.setdefault(trigger_of(source), Named()).add(
                    f"{name}  {shown(given)}"
                )
            if self.trigger and self.trigger not in caption and not source.regularization:
                found.without_trigger.add(f"{name}  {shown(caption)}")
            self._waiting.setdefault(caption, []).append(name)
        if len(self._waiting) >= TOKENISED_TOGETHER:
            self._tokenise()

    def _config(self, cells: ListedSample) -> SourceConfig:
        return self.work.planner.sources.opened[cells.source].config

    def _tokenise(self) -> None:
        """Counts the tokens of the captions that wait for it."""
        if not self._waiting:
            return
        counts, self.captions.limit = self.family.token_counts(list(self._waiting))
        for count, (caption, names) in zip(counts, self._waiting.items(), strict=True):
            self.captions.tokens.add(count)
            if count > self.captions.limit:
                more = f" and {len(names) - 1} more" * (len(names) > 1)
                self.captions.over.add(
                    f"{names[0]}{more}  {count} tokens: {shown(caption)}", len(names)
                )
        self._waiting = {}


def pairs(work: EncodeJob) -> Iterator[tuple[int, PlannedSample, ListedSample]]:
    """Number and cells of each row of the plan, with the cells of its entry in the listing; both
    ascend."""
    listed = work.listed.rows()
    entry, cells = next(listed, (-1, None))
    for number, row in work.planned.rows():
        while entry < row.listed:
            entry, cells = next(listed)
        assert cells is not None
        yield number, row, cells


def name_of(work: EncodeJob, cells: ListedSample) -> str:
    opened = work.planner.sources.opened
    name = shown(cells.name, 200)
    return name if len(opened) == 1 else f"{opened[cells.source].config.path}/{name}"


def shown(text: str, most: int = 60) -> str:
    """One line that does a terminal no harm."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text[: 4 * most].split()))
    return line if len(line) <= most else line[: most - 3] + "..."


def kind(config: SourceConfig) -> str:
    return config.kind if config.kind != "auto" else detect_kind(Path(config.path))


def alike(work: EncodeJob, held_out: np.ndarray) -> Named:
    """Groups of images whose files are the same."""
    entries, first_rows = np.unique(
        work.planned.column("listed"), return_index=True
    )  # not each of its clips
    contents, held_out = work.planned.keys("content_hash")[first_rows], held_out[first_rows]
    order = np.argsort(contents, kind="stable")
    same = np.concatenate([[False], contents[order][1:] == contents[order][:-1], [False]]).astype(
        np.int8
    )
    starts, ends = np.flatnonzero(np.diff(same) == 1), np.flatnonzero(np.diff(same) == -1) + 1
    first = np.argsort(order[starts], kind="stable")[:MOST_NAMED]
    groups = Named(len(starts))
    for start, end in zip(starts[first].tolist(), ends[first].tolist(), strict=True):
        rows = order[start:end]
        named = rows[:MOST_ALIKE]
        cells = work.listed.rows(entries[named])
        names = [
            name_of(work, found) + " (held out)" * bool(held_out[row])
            for row, (_, found) in zip(named, cells, strict=True)
        ]
        more = f" = ... and {len(rows) - len(named)} more" * (len(rows) > len(named))
        groups.first.append(" = ".join(names) + more)
    return groups


def sizes(rows: Table[PlannedSample]) -> np.ndarray:
    """Width and height of each row's bucket."""
    return np.column_stack(
        [rows.nested_column("crop", name) for name in ("crop_width", "crop_height")]
    )
