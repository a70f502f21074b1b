"""From the rows of all sources to what is trained on: content, crop, captions, and the keys of what
is stored."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from common.errors import DataError
from data.config import DataConfig, SourceConfig
from data.media import images, video
from data.media.buckets import Buckets, Crop
from data.media.captions import caption_variants, with_trigger
from data.sources import Source
from data.store import tables
from data.store.hashing import key_of, stamp_of
from data.store.store import MISSING, Store

AHEAD = 32  # rows that are read ahead of the one that is worked on
FEW = 2  # where they may be videos: a clip's pixels take hundreds of MB
VERSION = "2"  # of what is stored; a change makes every row be encoded anew
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Sources:
    """The sources of a run: of `opened`, those from `held_out_from` on are for validation."""

    config: DataConfig
    opened: tuple[Source, ...]
    held_out_from: int
    clips: video.Clips | None = None
    """What is taken of a video; None for models of images."""

    def contents(
        self, cells: list[dict[str, Any]]
    ) -> Iterator[tuple[dict[str, Any], bytes | DataError]]:
        """Rows of a listing, which ascend, with their files."""
        for number, source in enumerate(self.opened):
            mine = {row["row"]: row for row in cells if row["source"] == number}
            if not mine or not source.has_images:
                continue
            try:
                for row, content in source.contents(
                    {row: mine[row]["name"] for row in sorted(mine)}
                ):
                    yield mine.pop(row), content
            except DataError as error:  # of the source as a whole
                yield from ((row, error) for row in mine.values())


def write_listing(sources: Sources, path: Path) -> list[str]:
    """Writes a row for every entry of every source; returns what is wrong with some."""
    faults: list[str] = []
    with tables.writing(path, tables.LISTING) as table:
        for number, source in enumerate(sources.opened):
            for entry in source.entries(faults):
                table.add({"source": number, **vars(entry)})
    return faults


def ahead(work: Callable[[T], R], items: Iterable[T], most: int = AHEAD) -> Iterator[R]:
    """`work` of each item, in order, in threads that are a bounded number of items ahead."""
    pending: list[Any] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= most:
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()


def facts_key(cells: dict[str, Any], videos: bool) -> bytes:
    mask = stamp_of(Path(cells["mask"])) if cells["mask"] else ""
    return key_of("facts", cells["stamp"], mask, *["videos"] * videos)


def look(
    videos: bool, given: tuple[dict[str, Any], bytes | DataError]
) -> tuple[dict[str, Any], dict[str, Tensor] | str]:
    """A row with what must be known of its content, or what is wrong with it."""
    cells, content = given
    try:
        if isinstance(content, DataError):
            raise content
        facts = (
            video.check(content) if videos and video.is_video(content) else images.check(content)
        )
        mask = b""
        if cells["mask"]:
            mask = Path(cells["mask"]).read_bytes()
            images.check(mask)
    except (OSError, DataError) as error:
        return cells, f"{cells['name']}: {error}"
    found = torch.frombuffer(bytearray(key_of(content) + key_of(mask)), dtype=torch.uint8)
    known = {"content": found, "size": torch.tensor([facts.width, facts.height], dtype=torch.int32)}
    if isinstance(facts, video.Facts):
        known["seconds"] = torch.tensor(facts.seconds, dtype=torch.float64)
    return cells, known


def inspect_share(
    sources: Sources, listing: Path, facts: Store, share: tuple[int, int]
) -> list[tuple[int, str]]:
    """Opens the images of every `share[1]`th row from `share[0]` on that are not known yet, and notes their size and
    content. Returns the rows with a fault, and the fault."""
    table = tables.mapped(listing)
    rank, ranks = share
    videos = sources.clips is not None
    faults: list[tuple[int, str]] = []

    def unknown() -> Iterator[tuple[dict[str, Any], bytes | DataError]]:
        for start in range(0, len(table), tables.BATCH):
            numbers = np.arange(start, min(start + tables.BATCH, len(table)))
            cells = [
                {**row, "entry": n}
                for n, row in tables.rows_of(table, numbers[numbers % ranks == rank])
            ]
            yield from sources.contents(
                [row for row in cells if facts_key(row, videos) not in facts]
            )

    def rows() -> Iterator[tuple[bytes, dict[str, Tensor]]]:
        for cells, found in ahead(partial(look, videos), unknown(), FEW if videos else AHEAD):
            if isinstance(found, str):
                faults.append((cells["entry"], found))
            else:
                yield facts_key(cells, videos), found

    facts.write(rows())
    return faults


def stills(sources: Sources, listing: Path, facts: Store, fault: str) -> list[tuple[int, str]]:
    """The entries that are looked at, of which one frame would be taken, and that this is a
    `fault`."""
    found = []
    for entry, cells in tables.rows_of(tables.mapped(listing)):
        key = facts_key(cells, videos=True)
        if sources.opened[cells["source"]].has_images and key in facts:
            seconds = facts[key].get("seconds")
            if (
                seconds is None
                or sources.clips is None
                or sources.clips.of(seconds.item())[0].frames == 1
            ):
                found.append(
                    (
                        entry,
                        f"{cells['name']}: {'an image' if seconds is None else 'too short'}; {fault}",
                    )
                )
    return found


class Planner:
    """Makes rows of tables.ROWS from a row of the listing: one, or of a video one for each clip."""

    def __init__(self, sources: Sources, facts: Store, buckets: Buckets):
        self.sources, self.facts, self.buckets = sources, facts, buckets
        self.config = sources.config

    def rows(self, entry: int, cells: dict[str, Any]) -> Iterator[dict[str, Any]]:
        source = self.sources.opened[cells["source"]]
        held_out = cells["source"] >= self.sources.held_out_from
        config = source.config
        planned = source.planned(cells["row"])
        if planned is not None:
            every = [planned]
        else:
            every = (
                self._images(cells, config, held_out)
                if source.has_images
                else [self._tensors(cells)]
            )
        yield from (self._row(entry, cells, known, held_out) for known in every)

    def _row(
        self, entry: int, cells: dict[str, Any], known: dict[str, Any], held_out: bool
    ) -> dict[str, Any]:
        config = self.sources.opened[cells["source"]].config
        prior = self.config.prior_loss_weight if config.regularization else 1.0
        held_out = held_out or bool(known.get("held_out"))  # an encoded dataset says so itself
        trained_on = not (config.regularization or held_out) and known.get("may_hold_out", True)
        return {
            **known,
            "entry": entry,
            "repeats": cells["repeats"],
            "weight": known.get("weight", 1.0) * cells["weight"] * config.weight * prior,
            "dropout": config.captions.dropout if trained_on else 0.0,
            "held_out": held_out,
            "may_hold_out": not config.regularization and known.get("may_hold_out", True),
        }

    def _images(
        self, cells: dict[str, Any], config: SourceConfig, held_out: bool
    ) -> list[dict[str, Any]]:
        """What is stored of an image, or of each clip of a video."""
        shares = self.shares(cells, config, held_out)
        found = self.facts[facts_key(cells, self.sources.clips is not None)]
        both = bytes(found["content"].tolist())
        content, mask, crop = both[:16], both[16:], self.buckets.crop(*found["size"].tolist())
        # held-out rows are never mirrored, but all rows have as many keys
        flips = (False, not held_out) if self.config.random_flip else (False,)
        clips: list[video.Clip | None] = [None]
        if self.sources.clips is not None and "seconds" in found:
            clips = [*self.sources.clips.of(found["seconds"].item())]
        return [
            {
                "content": content,
                "media": [self.media_key(content, mask, (crop, clip), flip) for flip in flips],
                "texts": [key_of(text) for text in shares],
                "shares": list(shares.values()),
                "crop": list(astuple(crop)),
                "clip": clip and list(astuple(clip)),
            }
            for clip in clips
        ]

    def _tensors(self, cells: dict[str, Any]) -> dict[str, Any]:
        """What is stored of latents and conditioning that are taken as they are."""
        width, height = cells["width"], cells["height"]
        content = key_of("tensors", cells["stamp"])
        return {
            "content": content,
            "media": [key_of("latents", content, self.config.masks)]
            * (2 if self.config.random_flip else 1),
            "texts": [key_of("cond", content)],
            "shares": [1.0],
            "crop": list(astuple(Crop(width, height, width, height, 0, 0, width, height))),
        }

    def shares(
        self, cells: dict[str, Any], config: SourceConfig, held_out: bool
    ) -> dict[str, float]:
        """The captions of a row, and how often each is drawn; held-out rows have one that never
        changes."""
        if held_out:  # nothing of it is left to chance
            return {with_trigger(cells["captions"][0], config): 1.0}
        return caption_variants(cells["captions"], config)

    def media_key(
        self, content: bytes, mask: bytes, part: tuple[Crop, video.Clip | None], flip: bool
    ) -> bytes:
        masks, (crop, clip) = (
            self.config.masks if self.config.masks != "files" else mask.hex(),
            part,
        )
        frames = () if clip is None else (clip.name(),)
        return key_of(
            content, crop.name(), "mirrored" if flip else "", self.config.background, masks, *frames
        )


def write_rows(planner: Planner, listing: Path, path: Path, bad: set[int]) -> None:
    """Writes the row of every entry that is not `bad`."""
    with tables.writing(path, tables.ROWS) as table:
        for entry, cells in tables.rows_of(tables.mapped(listing)):
            if entry not in bad:
                for row in planner.rows(entry, cells):
                    table.add(row)


def short_videos(rows: pa.Table, listing: pa.Table, wanted: video.Clips | None) -> list[str]:
    """The videos of which less is taken than is wanted, and how much."""
    if wanted is None:
        return []
    found = video.frames_of(rows)
    short = np.flatnonzero((found > 0) & (found < wanted.frames))
    entries = tables.rows_of(listing, rows.column("entry").to_numpy()[short])
    taken = zip(entries, found[short].tolist(), strict=True)
    return [
        f"{cells['name']}: {frames} of them are taken, {wanted.fps:g} a second"
        for (_, cells), frames in taken
    ]


def missing(keys: np.ndarray, store: Store, wanted: np.ndarray) -> np.ndarray:
    """Where the `wanted` keys are that the store lacks, one place for each key, ascending."""
    lacking = np.flatnonzero((store.find(keys) == MISSING) & wanted)
    _, first = np.unique(keys[lacking], return_index=True)
    return np.sort(lacking[first])


def has_images(rows: pa.Table, listing: pa.Table, sources: Sources) -> np.ndarray:
    """Whether each row is an image, or else latents already."""
    source = listing.column("source").to_numpy()[rows.column("entry").to_numpy()]
    return np.array([opened.has_images for opened in sources.opened])[source]
