"""The files of a folder of images and its sub-folders, by their names alone."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import DataError
from data.media.images import EXTENSIONS as IMAGE_EXTENSIONS
from data.media.video import EXTENSIONS as VIDEO_EXTENSIONS
from data.sources.control_files import (
    CONTROL_NAME,
    check_repeats,
    number_of,
    numbered_files,
)
from data.sources.metadata import METADATA_NAMES, is_utf8

MASK_SUFFIX = "_mask"


@dataclass(frozen=True)
class FileKinds:
    """Extensions that distinguish the files of a folder."""

    media: frozenset[str]
    captions: tuple[str, ...]
    uses_masks: bool
    other_folders: frozenset[Path] = frozenset()
    """Folders that are not searched for images."""


@dataclass
class Directory:
    """The files of one directory that matter, and errors in their names."""

    path: Path
    images: list[Path] = field(default_factory=list)
    captions: dict[str, list[Path]] = field(default_factory=dict)
    """Caption files by name without extension."""
    masks: dict[str, Path] = field(default_factory=dict)
    """Mask files by name without extension."""
    controls: dict[str, list[Path]] = field(default_factory=dict)
    """Control images by the name of their image without extension."""
    metadata: Path | None = None
    other_kinds: Counter[str] = field(default_factory=Counter)
    """Number of all other files by extension."""
    errors: list[str] = field(default_factory=list)

    def caption_files(self) -> list[Path]:
        """Return all caption files."""
        return [path for paths in self.captions.values() for path in paths]

    def unused_captions(self) -> list[Path]:
        """Return the caption files without an image."""
        stems = {image.stem for image in self.images}
        return [path for path in self.caption_files() if path.stem not in stems]


def walk_directories(folder: Path, kinds: FileKinds) -> Iterator[Directory]:
    """Yield a folder and all its sub-folders in a fixed order.

    Each comes once, even if links lead to it several times. Names that begin with a dot are
    skipped."""
    visited: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        try:
            stat = path.stat()
            with os.scandir(path) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            yield Directory(path, errors=[f"{path}: cannot be read: {error.strerror}"])
            continue
        identity = (stat.st_dev, stat.st_ino)
        if identity in visited:
            continue
        visited.add(identity)
        visible.sort(key=lambda entry: entry.name)
        folders = [
            entry
            for entry in visible
            if is_directory(entry) and Path(entry.path).resolve() not in kinds.other_folders
        ]
        names = [entry.name for entry in visible if not is_directory(entry)]
        waiting += [Path(entry.path) for entry in reversed(folders)]
        yield sort_files(path, names, kinds)


def sort_files(path: Path, names: list[str], kinds: FileKinds) -> Directory:
    """Return the files of a directory by their purpose."""
    directory = Directory(path)
    media = [path / name for name in names if is_media(name)]
    media_stems = {file.stem for file in media}
    caption_stems = {Path(name).stem for name in names if is_caption(name, kinds)}
    add_controls(directory, media, media_stems, caption_stems)
    control_files = {file for files in directory.controls.values() for file in files}
    names_by_lower_case: dict[str, str] = {}
    for name in names:
        file = path / name
        if not is_utf8(name):
            directory.errors.append(f"{str(file)!a}: a name that is not UTF-8")
            continue
        similar_name = names_by_lower_case.setdefault(name.lower(), name)
        if similar_name != name:
            directory.errors.append(
                f"{file}: differs from {similar_name} only by case, and is the same file on other "
                "systems"
            )
        if file in control_files:
            continue
        if file.suffix.lower() in kinds.media:
            add_image(directory, file, media_stems, kinds)
        elif file.suffix.lower() in kinds.captions:
            directory.captions.setdefault(file.stem, []).append(file)
        elif name in METADATA_NAMES:
            add_metadata(directory, file)
        else:
            directory.other_kinds[file.suffix or name] += 1
    return directory


def add_controls(
    directory: Directory, media: list[Path], media_stems: set[str], caption_stems: set[str]
) -> None:
    """Add the control images that are next to their image. A file with its own caption is an image."""
    candidates = [file for file in media if file.stem not in caption_stems]
    for name, files in numbered_files(candidates, CONTROL_NAME).items():
        if name not in media_stems:
            continue
        directory.controls[name] = files
        numbers = [number_of(file, CONTROL_NAME) for file in files]
        try:
            check_repeats(directory.path / name, files, numbers)
        except DataError as error:
            directory.errors.append(str(error))


def is_caption(name: str, kinds: FileKinds) -> bool:
    """Return whether a file is a caption file by its extension."""
    return Path(name).suffix.lower() in kinds.captions


def add_image(directory: Directory, file: Path, media_stems: set[str], kinds: FileKinds) -> None:
    """Add an image or a mask.

    A file with the name of a mask is one if masks are used, or if its image is next to it."""
    has_mask_name = file.stem.endswith(MASK_SUFFIX)
    has_image = file.stem.removesuffix(MASK_SUFFIX) in media_stems
    if has_mask_name and (kinds.uses_masks or has_image):
        directory.masks[file.stem] = file
    else:
        directory.images.append(file)


def add_metadata(directory: Directory, file: Path) -> None:
    """Add the metadata file of a directory, which has at most one."""
    if directory.metadata is None:
        directory.metadata = file
        return
    directory.errors.append(
        f"{file}: {directory.metadata.name} is in the same folder. Keep one of the two"
    )


def is_media(name: str) -> bool:
    """Return whether a file is an image or a video by its extension."""
    return Path(name).suffix.lower() in IMAGE_EXTENSIONS | VIDEO_EXTENSIONS


def is_directory(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False
