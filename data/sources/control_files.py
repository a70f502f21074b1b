"""Control images of the images in a folder, found by their names or by the columns of a metadata file."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.errors import DataError
from data.media.images import EXTENSIONS

CONTROL_COLUMN = "control_image"
"""Column with control images, unless data.control_columns names others."""
CONTROL_NAME = re.compile(r"(.+)_control(?:_(\d+))?")
"""Name, without extension, of a control image next to its image."""
NUMBERED_NAME = re.compile(r"(.+)_(\d+)")
"""Name of one of several control images in a folder of control images."""

FilesByName = dict[str, list[Path]]
"""Name of an image without extension -> its control images, in their order."""


def beside_image(files: Iterable[Path]) -> FilesByName:
    """Return the control images in the folder of their images, by the names of the images."""
    return numbered_files(files, CONTROL_NAME)


def numbered_files(files: Iterable[Path], pattern: re.Pattern[str]) -> FilesByName:
    """Return files by the first group of their names, in the order of the number in the second."""
    numbered: dict[str, list[tuple[int, Path]]] = {}
    for file in files:
        match = pattern.fullmatch(file.stem)
        if match is None:
            continue
        name, digits = match.groups()
        number = int(digits or 0)
        files_of_image = numbered.setdefault(name, [])
        files_of_image.append((number, file))
    ordered: FilesByName = {}
    for name, pairs in numbered.items():
        pairs.sort()
        ordered[name] = [file for _, file in pairs]
    return ordered


def images_in(folder: Path) -> list[Path]:
    """Return the images directly in a folder; none if it does not exist."""
    if not folder.is_dir():
        return []
    images = []
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in EXTENSIONS:
            images.append(file)
    return images


class ControlFolder:
    """The images in one directory, by the name of the image that they control."""

    def __init__(self, path: Path):
        images = images_in(path)
        self.numbered = numbered_files(images, NUMBERED_NAME)
        self.same_name: FilesByName = {}
        for image in images:
            files = self.same_name.setdefault(image.stem, [])
            files.append(image)

    def files(self, name: str) -> list[Path]:
        """Return the control images of an image with this name."""
        if name in self.same_name:
            return self.same_name[name]
        return self.numbered.get(name, [])


@lru_cache(maxsize=1024)
def open_folder(path: Path) -> ControlFolder:
    return ControlFolder(path)


def in_folders(image: Path, root: Path, folders: Iterable[str]) -> list[Path]:
    """Return the control images of an image, from each folder in its order.

    `root`: the folder of the training images. Sub-folders correspond to those of `root`. Raises
    DataError if a folder has no control image for it, or several files with the same name."""
    controls = []
    sub_folder = image.parent.relative_to(root)
    for folder in folders:
        path = Path(folder)
        files = open_folder(path / sub_folder).files(image.stem)
        if not files:
            files = open_folder(path).files(image.stem)
        if not files:
            raise DataError(
                f"{image}: no control image {image.stem}.<extension> or {image.stem}_0.<extension> in "
                f"{folder} (--data.control_paths)"
            )
        different_names = {file.stem for file in files}
        if len(different_names) < len(files):
            file_names = " and ".join(file.name for file in files)
            raise DataError(f"{image}: several control images in {folder}, {file_names}. Keep one")
        controls += files
    return controls


def column_names(configured: tuple[str, ...] | None, existing: Iterable[str]) -> list[str]:
    """Return the columns with control images: those configured, or the default one if it exists."""
    if configured is not None:
        return list(configured)
    return [CONTROL_COLUMN] if CONTROL_COLUMN in existing else []


def in_columns(row: Mapping[str, Any], columns: Iterable[str], folder: Path) -> list[Path]:
    """Return the control images that a row of a metadata file names, relative to its folder.

    Raises DataError if a file is missing, or a cell has no names."""
    controls = []
    for column in columns:
        cell = row.get(column)
        if not cell:
            continue
        names = [cell] if isinstance(cell, str) else cell
        if not is_list_of_names(names):
            raise DataError(f"has no file names of control images in {column}: {cell!r}")
        for name in names:
            path = folder / name
            if not path.is_file():
                raise DataError(f"has a control image {name} in {column}, which is not in {folder}")
            controls.append(path)
    return controls


def is_list_of_names(value: Any) -> bool:
    """Return whether a value is a list of texts."""
    if not isinstance(value, list):
        return False
    return all(isinstance(name, str) for name in value)
