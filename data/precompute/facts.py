"""Facts about the content of images and videos. Each content is decoded once to find them.

The cache of the facts is a folder of small tables, <hash of its content>.arrow. A file whose
content does not have this hash is damaged. Several processes may write to the folder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from common.atomic import WriteError, remove_old, write_file
from common.errors import DataError
from common.hashing import file_stamp, hash_of
from common.process import ProcessInfo
from data.media import images, video
from data.precompute.controls import ContentHashes
from data.precompute.run_sources import IndexedSample, ListedContent, RunSources
from data.precompute.streams import map_ahead
from data.samples import ListedSample
from data.store.keys import key_array, key_of
from data.store.tables import Float64, Table, arrow_schema, from_cells, table_to_bytes

FACTS_PER_FILE = 1024
MAX_PARTIAL_DAYS = 1
"""Age at which the unfinished file of a killed process is removed."""


@dataclass(frozen=True)
class MediaFacts:
    """Facts about a content, its mask and its control images."""

    key: bytes
    """Key of the stamps of the files (`facts_key`)."""
    content_hash: bytes
    mask_hash: bytes
    width: int
    height: int
    seconds: Float64 | None = None
    """Length of a video; None for an image."""
    control_sides: list[int] = field(default_factory=list)
    """Width and height of each control image, one after the other."""
    control_hash: bytes = key_of()
    """Hash of the contents of all control images."""
    mask_maximum: int = 255
    """Brightest level of the mask file; 255 without one."""

    @property
    def control_sizes(self) -> list[tuple[int, int]]:
        """Return width and height of each control image."""
        sides = self.control_sides
        return list(zip(sides[::2], sides[1::2], strict=True))

    @property
    def hashes(self) -> ContentHashes:
        return ContentHashes(self.content_hash, self.mask_hash, self.control_hash)


class CheckedSample(NamedTuple):
    """Index of a listed sample, and its facts or the error that makes it unusable."""

    listed: int
    facts: MediaFacts | DataError


def facts_key(sample: ListedSample, has_videos: bool) -> bytes:
    """Return the key of a sample's facts, which changes when its files may have changed.

    `has_videos`: files are checked as videos too, which makes other facts of animations."""
    mask_stamp = file_stamp(Path(sample.mask_path)) if sample.mask_path else ""
    checks = "with videos" if has_videos else "images"
    return key_of("facts", sample.stamp, mask_stamp, checks)


class FactsCache:
    """The facts of all contents that were checked."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.reload()

    def reload(self) -> None:
        """Read all files that exist now and are intact."""
        tables = [arrow_schema(MediaFacts).empty_table()]
        for path in self.folder.glob("*.arrow"):
            content = read_intact(path)
            if content is not None:
                tables.append(pa.ipc.open_file(content).read_all())
        table = pa.concat_tables(tables).combine_chunks()
        keys = key_array(table.column("key").to_pylist())
        order = np.argsort(keys, kind="stable")
        self.keys = keys[order]
        self.table = table.take(pa.array(order))

    def find(self, key: bytes) -> int | None:
        """Return the position of the facts with this key, or None."""
        keys = key_array([key])
        (position,) = np.searchsorted(self.keys, keys).tolist()
        if position < len(self.keys) and self.keys[position] == keys[0]:
            return position
        return None

    def __contains__(self, key: bytes) -> bool:
        return self.find(key) is not None

    def __getitem__(self, key: bytes) -> MediaFacts:
        """Return the facts with this key. Raises KeyError."""
        position = self.find(key)
        if position is None:
            raise KeyError(key.hex())
        (cells,) = self.table.slice(position, 1).to_pylist()
        return from_cells(MediaFacts, cells)

    def remove_damaged(self) -> list[Path]:
        """Remove damaged files, which are returned, and unfinished files of killed processes."""
        remove_old(self.folder.glob(".*.partial"), MAX_PARTIAL_DAYS)
        damaged_paths = []
        for path in self.folder.glob("*.arrow"):
            if read_intact(path) is None:
                damaged_paths.append(path)
                path.unlink(missing_ok=True)
        return damaged_paths

    @contextmanager
    def writer(self) -> "Iterator[FactsWriter]":
        """Yield a writer. The last facts are written when the block ends without an error."""
        writer = FactsWriter(self.folder)
        yield writer
        writer.flush()


class FactsWriter:
    """Takes facts one at a time and writes them in files of a limited size."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.facts: list[MediaFacts] = []

    def add(self, facts: MediaFacts) -> None:
        self.facts.append(facts)
        if len(self.facts) == FACTS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write the facts that are not written yet. Raises DataError if that fails."""
        if not self.facts:
            return
        content = table_to_bytes(self.facts, MediaFacts)
        path = self.folder / f"{hash_of(content)}.arrow"
        try:
            write_file(path, content, is_shared=True)
        except WriteError as error:
            raise DataError(f"--data.cache_dir: {error}") from error
        self.facts = []


def read_intact(path: Path) -> bytes | None:
    """Return the content of a file of facts; None if it is damaged or was just removed."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content if hash_of(content) == path.stem else None


def check_share(
    sources: RunSources, listed: Table[ListedSample], facts: FactsCache, process: ProcessInfo
) -> list[tuple[int, str]]:
    """Find the missing facts of this process's share of the samples.

    Returns index and error of the samples that cannot be used."""
    has_videos = sources.clip_sampling is not None
    indices = np.arange(process.index, len(listed), process.count)

    def check(item: ListedContent) -> CheckedSample:
        return check_content(item, has_videos, sources.full_name(item.sample))

    def unchecked_samples() -> Iterator[IndexedSample]:
        for index, sample in listed.rows(indices):
            has_images = sources.source_of(sample).has_images
            if has_images and facts_key(sample, has_videos) not in facts:
                yield index, sample

    errors = []
    contents = sources.contents(unchecked_samples())
    with facts.writer() as writer:
        for checked in map_ahead(check, contents, sources.num_ahead):
            if isinstance(checked.facts, MediaFacts):
                writer.add(checked.facts)
            else:
                errors.append((checked.listed, str(checked.facts)))
    return errors


def check_content(item: ListedContent, has_videos: bool, name: str) -> CheckedSample:
    """Decode a content and its mask once; return its facts, or the error with `name`."""
    sample, content = item.sample, item.content
    try:
        if isinstance(content, DataError):
            raise content
        seconds = None
        media: images.ImageFacts | video.VideoFacts
        if has_videos and video.is_video(content):
            media = video.check(content)
            seconds = media.seconds
        else:
            media = images.check(content)
        mask = read_mask(sample)
        mask_maximum = 255
        if sample.mask_path:
            mask_maximum = images.brightest_level(mask)
        control_sides = check_controls(item)
    except (OSError, DataError) as error:
        return CheckedSample(item.listed, DataError(f"{name}: {error}"))
    facts = MediaFacts(
        key=facts_key(sample, has_videos),
        content_hash=key_of(content),
        mask_hash=key_of(mask),
        width=media.width,
        height=media.height,
        seconds=seconds,
        control_sides=control_sides,
        control_hash=key_of(*item.controls),
        mask_maximum=mask_maximum,
    )
    return CheckedSample(item.listed, facts)


def check_controls(item: ListedContent) -> list[int]:
    """Decode the control images of a sample; return width and height of each. Raises DataError."""
    sides: list[int] = []
    for number, content in enumerate(item.controls):
        try:
            facts = images.check(content)
        except DataError as error:
            raise DataError(f"control image {name_of_control(item, number)}: {error}") from error
        sides += [facts.width, facts.height]
    return sides


def name_of_control(item: ListedContent, number: int) -> str:
    """Return the path of a control image, or its number."""
    paths = item.sample.control_paths
    return paths[number] if paths else str(number)


def read_mask(sample: ListedSample) -> bytes:
    """Return the content of a sample's mask file; nothing if it has none."""
    if not sample.mask_path:
        return b""
    return Path(sample.mask_path).read_bytes()
