"""A folder of images with captions: caption files beside them, a metadata file, or one caption for
all."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.errors import DataError
from data.config import DataConfig, SourceConfig
from data.media.images import EXTENSIONS
from data.media.video import EXTENSIONS as VIDEOS
from data.sources.base import Entry, Source
from data.sources.metadata import METADATA, Described, is_text, read_metadata
from data.store.hashing import stamp_of

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
        return [
            file for stem, files in self.captions.items() if stem not in stems for file in files
        ]


class FolderSource(Source):
    """A folder of images, with its sub-folders."""

    def __init__(self, config: SourceConfig, data: DataConfig, videos: bool = False):
        """`videos`: whether video files are taken too."""
        super().__init__(config)
        self.folder, self.with_masks = Path(config.path), data.masks == "files"
        self.extensions = EXTENSIONS | VIDEOS if videos else EXTENSIONS
        self.count = 0

    def entries(self, faults: list[str]) -> Iterator[Entry]:
        counts, shared = self._survey(faults)
        if not counts["images"]:
            found = ", ".join(sorted(counts["others"])) or "nothing"
            faults.append(
                f"{self.folder}: no image ({', '.join(sorted(self.extensions))}); it holds {found}"
            )
            return
        if not (counts["captions"] or counts["metadata"] or self.config.captions.text is not None):
            extensions = " or ".join(self.config.captions.extensions or ())
            faults.append(
                f"{self.folder}: {counts['images']} images, no {extensions} file; give one caption for all as "
                "--data.captions.text, or write caption files"
            )
            return
        described: dict[Path, Described] = {}
        for directory in self._directories([]):
            if (
                directory.metadata is not None
            ):  # which may speak of sub-folders, and these come later
                described |= read_metadata(directory.metadata, self.config, faults)
            for path in directory.images:
                known = described.pop(path, None)
                captions = self._captions(directory, path, (shared, known), faults)
                entry = None if captions is None else self._entry(directory, path, captions, faults)
                if entry is not None:
                    yield replace(entry, weight=known.weight) if known is not None else entry

    def _entry(
        self, directory: Directory, path: Path, captions: list[str], faults: list[str]
    ) -> Entry | None:
        mask = directory.masks.get(path.stem + MASK) if self.with_masks else None
        if self.with_masks and mask is None:
            faults.append(
                f"{path}: no mask {path.stem}{MASK}.<extension> beside it (--data.masks files)"
            )
            return None
        try:
            stamp = stamp_of(path)
        except OSError as error:
            faults.append(f"{path}: cannot be read: {error.strerror}")
            return None
        repeats = self.config.repeats * repeats_of(path, self.folder)
        name = str(path.relative_to(self.folder))
        self.count += 1
        return Entry(self.count - 1, name, captions, stamp, repeats, 1.0, str(mask or ""))

    def _survey(self, faults: list[str]) -> tuple[dict[str, Any], Path | None]:
        """What there is, and the one caption file for all images if there is one. Names alone are
        looked at."""
        counts: dict[str, Any] = {"images": 0, "captions": 0, "metadata": 0, "others": set()}
        orphans: list[Path] = []
        for directory in self._directories(faults):
            counts["images"] += len(directory.images)
            counts["captions"] += sum(len(files) for files in directory.captions.values())
            counts["metadata"] += directory.metadata is not None
            counts["others"] |= set(directory.others)
            orphans += directory.orphans()
            if self.config.captions.text is not None:
                files = [file for found in directory.captions.values() for file in found]
                faults += [
                    f"{file}: a caption file beside --data.captions.text; keep one of the two"
                    for file in files
                ]
        if self.config.captions.text is not None:
            return counts, None
        if counts["metadata"]:
            return counts, None  # then a README.txt is no caption
        if counts["captions"] == 1 and len(orphans) == 1 and counts["images"]:
            return counts, orphans[0]
        faults += (
            [f"{file}: a caption without an image" for file in orphans] if counts["images"] else []
        )
        return counts, None

    def _captions(
        self,
        directory: Directory,
        path: Path,
        given: tuple[Path | None, Described | None],
        faults: list[str],
    ) -> list[str] | None:
        shared, known = given
        files = [shared] if shared is not None else directory.captions.get(path.stem, [])
        if self.config.captions.text is not None:
            return [self.config.captions.text]
        found = None if known is None else known.captions
        if found is not None and files:
            faults.append(
                f"{path}: captions in {files[0].name} and in a metadata file; keep one of the two"
            )
        elif found is not None:
            return found
        if not files:
            wanted = (self.config.captions.extensions or (".txt",))[0]
            faults.append(f"{path}: no caption file {path.stem}{wanted} beside it")
            return None
        if len(files) > 1:
            faults.append(
                f"{path}: several captions, {' and '.join(f.name for f in files)}; keep one"
            )
        return read_caption(files[0], bool(self.config.captions.one_per_line), faults)

    def _directories(self, faults: list[str]) -> Iterator[Directory]:
        """All directories below, in a fixed order, each once though links may lead to it more
        often."""
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
            yield self._directory(
                path, [item.name for item in visible if not is_directory(item)], faults
            )

    def _directory(self, path: Path, names: list[str], faults: list[str]) -> Directory:
        directory = Directory(path)
        lower: dict[str, str] = {}
        for name in names:
            file = path / name
            if not is_text(name):
                faults.append(f"{str(file)!a}: a name that is not UTF-8")
                continue
            if (other := lower.setdefault(name.lower(), name)) != name:
                faults.append(
                    f"{file}: differs from {other} by case alone, and is the same file on other systems"
                )
            if file.suffix.lower() in self.extensions:
                if file.stem.endswith(MASK) and (self.with_masks or of_image(file, names)):
                    directory.masks[file.stem] = file
                else:
                    directory.images.append(file)
            elif file.suffix in (self.config.captions.extensions or ()):
                directory.captions.setdefault(file.stem, []).append(file)
            elif name in METADATA and directory.metadata is not None:
                faults.append(
                    f"{file}: {directory.metadata.name} is there too; keep one of the two"
                )
            elif name in METADATA:
                directory.metadata = file
            else:
                directory.others.append(file.suffix or name)
        return directory

    def contents(self, names: dict[int, str]) -> Iterator[tuple[int, bytes | DataError]]:
        for row, name in names.items():
            try:
                yield row, (self.folder / name).read_bytes()
            except OSError as error:
                yield row, DataError(f"cannot be read: {error.strerror}")


def of_image(mask: Path, names: list[str]) -> bool:
    """Whether there is an image beside a file that has a mask's name."""
    wanted = mask.stem.removesuffix(MASK)
    return any(
        Path(name).stem == wanted and Path(name).suffix.lower() in EXTENSIONS | VIDEOS
        for name in names
    )


def is_directory(item: os.DirEntry) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def repeats_of(path: Path, folder: Path) -> int:
    """kohya's convention: an image in a folder named `<repeats>_<name>` is seen that often per
    epoch."""
    for parent in [path.parent, *path.parent.parents]:
        if match := re.fullmatch(r"(\d{1,4})_.*", parent.name):
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
