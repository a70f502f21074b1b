"""A folder of images with captions: caption files beside them, a metadata file, or one caption for all."""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.config import DataConfig, DataError, SourceConfig
from data.images import EXTENSIONS
from data.sources.base import Entry, Source

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"  # the column of `datasets`' imagefolder
MASK = "_mask"


@dataclass
class Directory:
    """The files of one directory that matter, by name without extension."""

    path: Path
    images: list[Path] = field(default_factory=list)
    captions: dict[str, list[Path]] = field(default_factory=dict)
    masks: dict[str, Path] = field(default_factory=dict)
    metadata: Path | None = None
    others: list[str] = field(default_factory=list)

    def orphans(self) -> list[Path]:
        """Captions without an image."""
        stems = {image.stem for image in self.images}
        return [file for stem, files in self.captions.items() if stem not in stems for file in files]


class FolderSource(Source):
    """A folder of images, with its sub-folders."""

    def __init__(self, config: SourceConfig, data: DataConfig):
        super().__init__(config)
        self.folder, self.with_masks = Path(config.path), data.masks == "files"
        self.paths: list[Path] = []

    def entries(self, faults: list[str]) -> Iterator[Entry]:
        counts, shared = self._survey(faults)
        if not counts["images"]:
            found = ", ".join(sorted(counts["others"])) or "nothing"
            faults.append(f"{self.folder}: no image ({', '.join(sorted(EXTENSIONS))}); it holds {found}")
            return
        if not (counts["captions"] or counts["metadata"] or self.config.caption is not None):
            extensions = " or ".join(self.config.caption_extension or ())
            faults.append(
                f"{self.folder}: {counts['images']} images, no {extensions} file; give one caption for all as "
                "--data.caption, or write caption files"
            )
            return
        for directory in self._directories([]):
            described = read_metadata(directory, self.config, faults)
            for path in directory.images:
                captions = self._captions(directory, path, (shared, described), faults)
                if captions is not None:
                    yield self._entry(directory, path, captions, faults)

    def _entry(self, directory: Directory, path: Path, captions: list[str], faults: list[str]) -> Entry:
        mask = directory.masks.get(path.stem + MASK)
        if self.with_masks and mask is None:
            faults.append(f"{path}: no mask {path.stem}{MASK}.<extension> beside it (--data.masks files)")
        self.paths.append(path)
        repeats = self.config.repeats * repeats_of(path, self.folder)
        name = str(path.relative_to(self.folder))
        return Entry(len(self.paths) - 1, name, captions, stamp_of(path), repeats, 1.0, str(mask or ""))

    def _survey(self, faults: list[str]) -> tuple[dict[str, Any], Path | None]:
        """What there is, and the one caption file for all images if there is one. Names alone are looked at."""
        counts: dict[str, Any] = {"images": 0, "captions": 0, "metadata": 0, "others": set()}
        orphans: list[Path] = []
        for directory in self._directories(faults):
            counts["images"] += len(directory.images)
            counts["captions"] += sum(len(files) for files in directory.captions.values())
            counts["metadata"] += directory.metadata is not None
            counts["others"] |= set(directory.others)
            orphans += directory.orphans()
            if self.config.caption is not None:
                files = [file for found in directory.captions.values() for file in found]
                faults += [f"{file}: a caption file beside --data.caption; keep one of the two" for file in files]
        if self.config.caption is not None:
            return counts, None
        if counts["captions"] == 1 and len(orphans) == 1 and counts["images"]:
            return counts, orphans[0]
        faults += [f"{file}: a caption without an image" for file in orphans] if counts["images"] else []
        return counts, None

    def _captions(
        self, directory: Directory, path: Path, given: tuple[Path | None, dict[str, Any]], faults: list[str]
    ) -> list[str] | None:
        shared, described = given
        files = [shared] if shared is not None else directory.captions.get(path.stem, [])
        if self.config.caption is not None:
            return [self.config.caption]
        found = described.get(path.name)
        if found is not None and files:
            faults.append(f"{path}: captions in {files[0].name} and in {directory.metadata}; keep one of the two")
        elif found is not None:
            return found
        if not files:
            wanted = (self.config.caption_extension or (".txt",))[0]
            faults.append(f"{path}: no caption file {path.stem}{wanted} beside it")
            return None
        if len(files) > 1:
            faults.append(f"{path}: several captions, {' and '.join(f.name for f in files)}; keep one")
        return read_caption(files[0], bool(self.config.caption_multi), faults)

    def _directories(self, faults: list[str]) -> Iterator[Directory]:
        """All directories below, in a fixed order, each once though links may lead to it more often."""
        seen: set[tuple[int, int]] = set()
        pending = [self.folder]
        while pending:
            path = pending.pop()
            try:
                stat = path.stat()
                with os.scandir(path) as scan:
                    items = sorted(scan, key=lambda item: item.name)
            except OSError as error:
                faults.append(f"{path}: cannot be read: {error.strerror}")
                continue
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            visible = [item for item in items if not item.name.startswith(".")]
            pending += [Path(item.path) for item in reversed(visible) if is_directory(item)]
            yield self._directory(path, [item.name for item in visible if not is_directory(item)], faults)

    def _directory(self, path: Path, names: list[str], faults: list[str]) -> Directory:
        directory = Directory(path)
        lower: dict[str, str] = {}
        for name in names:
            file = path / name
            if (other := lower.setdefault(name.lower(), name)) != name:
                faults.append(f"{file}: differs from {other} by case alone, and is the same file on other systems")
            if file.suffix.lower() in EXTENSIONS:
                if self.with_masks and file.stem.endswith(MASK):
                    directory.masks[file.stem] = file
                else:
                    directory.images.append(file)
            elif file.suffix in (self.config.caption_extension or ()):
                directory.captions.setdefault(file.stem, []).append(file)
            elif name in METADATA:
                directory.metadata = file
            else:
                directory.others.append(file.suffix or name)
        return directory

    def contents(self, rows: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        if not self.paths:
            for _ in self.entries([]):
                pass
        for row in rows:
            yield row, self.paths[row].read_bytes()


def is_directory(item: os.DirEntry) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def stamp_of(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def repeats_of(path: Path, folder: Path) -> int:
    """kohya's convention: an image in a folder named `<repeats>_<name>` is seen that often per epoch."""
    for parent in [path.parent, *path.parent.parents]:
        if match := re.fullmatch(r"(\d+)_.*", parent.name):
            return max(1, int(match[1]))
        if parent == folder:
            break
    return 1


def read_caption(file: Path, multi: bool, faults: list[str]) -> list[str] | None:
    """The caption, or all of them."""
    try:
        text = file.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        faults.append(f"{file}: not UTF-8 (byte {error.start}: {error.reason})")
        return None
    except OSError as error:
        faults.append(f"{file}: cannot be read: {error.strerror}")
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()] if multi else []
    return lines or [text]


def read_metadata(directory: Directory, config: SourceConfig, faults: list[str]) -> dict[str, list[str]]:
    """Captions by file name."""
    file, column = directory.metadata, config.caption_column
    if file is None or config.caption is not None:
        return {}
    try:
        rows = list(metadata_rows(file))
    except (OSError, ValueError, csv.Error, DataError) as error:
        faults.append(f"{file}: cannot be read: {error}")
        return {}
    if not rows or FILE_NAME not in rows[0] or column not in rows[0]:
        known = ", ".join(map(str, rows[0])) if rows else "none"
        faults.append(f"{file}: wants the columns {FILE_NAME} and {column} (--data.caption_column); it has {known}")
        return {}
    result: dict[str, list[str]] = {}
    there = {image.name for image in directory.images}
    for number, row in enumerate(rows, 1):
        name, caption = row.get(FILE_NAME), row.get(column)
        captions = [caption] if isinstance(caption, str) else caption
        if name not in there:
            faults.append(f"{file} row {number}: {name} is not in {directory.path}")
        elif not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
            faults.append(f"{file} row {number}: {name} has no caption in {column}")
        else:
            result[name] = captions
    return result


def metadata_rows(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(file).to_pylist()
        return
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".csv":
            yield from csv.DictReader(lines)
            return
        for number, line in enumerate(lines, 1):
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise DataError(f"line {number} is no JSON object")
            if row:
                yield row
