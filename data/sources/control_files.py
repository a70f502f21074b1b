"""Control images of the images in a folder, found by their names or by the columns of a metadata file."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import DataError
from data.media.images import EXTENSIONS

CONTROL_COLUMN = "control_image"
"""Column with control images, unless data.control_columns names others."""
CONTROL_NAME = re.compile(r"(.+)_control(?:_(\d+))?", re.IGNORECASE)
"""Name, without extension, of a control image next to its image."""
NUMBERED_NAME = re.compile(r"(.+)_(\d+)")
"""Name of one of several control images in a folder of control images."""

FilesByName = dict[str, list[Path]]
"""Name of an image without extension -> its control images, in their order."""


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


def number_of(file: Path, pattern: re.Pattern[str]) -> int:
    """Return the number in the name of a control image, 0 if it has none."""
    match = pattern.fullmatch(file.stem)
    if match is None:
        return 0
    return int(match[2] or 0)


def check_repeats(image: Path, files: list[Path], numbers: list[int]) -> None:
    """Raise DataError if several control images of an image have the same number."""
    files_of_number: dict[int, list[Path]] = {}
    for file, number in zip(files, numbers, strict=True):
        files_with_number = files_of_number.setdefault(number, [])
        files_with_number.append(file)
    for repeated in files_of_number.values():
        if len(repeated) > 1:
            names = " and ".join(file.name for file in repeated)
            raise DataError(
                f"{image}: several files for one control image, {names}. Keep one of them"
            )


class ControlFolder:
    """The images directly in a folder of control images."""

    def __init__(self, path: Path):
        self.images: list[Path] = []
        self.has_folders = False
        if not path.is_dir():
            return
        for file in sorted(path.iterdir()):
            if file.is_dir():
                self.has_folders = True
            elif file.suffix.lower() in EXTENSIONS:
                self.images.append(file)
        self.by_name: FilesByName = {}
        for image in self.images:
            files = self.by_name.setdefault(image.stem, [])
            files.append(image)
        self.numbered = numbered_files(self.images, NUMBERED_NAME)

    def files(self, name: str, image_names: set[str]) -> list[Path]:
        """Return the control images of an image with this name.

        `image_names`: the names of all images in its folder. A file with the name of one of these is
        not the numbered control image of another one."""
        if not self.images:
            return []
        files = list(self.by_name.get(name, ()))
        for file in self.numbered.get(name, ()):
            if file.stem not in image_names:
                files.append(file)
        return files


class ControlFolders:
    """Folders of control images. What was listed is kept until `forget`."""

    def __init__(self, root: Path, paths: Iterable[str]):
        """`root`: the folder of the training images."""
        self.root = root
        self.paths = [Path(path) for path in paths]
        self.listed: dict[Path, ControlFolder] = {}

    def forget(self) -> None:
        """Free the listings."""
        self.listed = {}

    def files(self, image: Path, image_names: set[str]) -> list[Path]:
        """Return the control images of an image, from each folder in its order.

        Sub-folders correspond to those of the training images, unless the control images have none.
        Raises DataError if a folder has no control image, or several with the same name."""
        controls = []
        sub_folder = image.parent.relative_to(self.root)
        for path in self.paths:
            folder = self._open(path / sub_folder)
            if not folder.images and not self._open(path).has_folders:
                folder = self._open(path)
            files = folder.files(image.stem, image_names)
            if not files:
                raise DataError(
                    f"{image}: no control image {image.stem}.<extension> or "
                    f"{image.stem}_0.<extension> in {path} (--data.control_paths)"
                )
            check_numbers(image, files)
            controls += files
        return controls

    def _open(self, path: Path) -> ControlFolder:
        if path not in self.listed:
            self.listed[path] = ControlFolder(path)
        return self.listed[path]


def check_numbers(image: Path, files: list[Path]) -> None:
    """Raise DataError unless the numbers of an image's control images are 0, 1, 2 or 1, 2, 3.

    A file with the name of the image is number 0."""
    numbers = []
    for file in files:
        number = 0 if file.stem == image.stem else number_of(file, NUMBERED_NAME)
        numbers.append(number)
    check_repeats(image, files, numbers)
    first = min(*numbers, 1)
    if sorted(numbers) != list(range(first, first + len(numbers))):
        names = ", ".join(file.name for file in files)
        raise DataError(f"{image}: the numbers of its control images have a gap: {names}")


def column_names(configured: tuple[str, ...] | None, existing: Iterable[str]) -> list[str]:
    """Return the columns with control images: those configured, or the default one if it exists."""
    if configured is not None:
        return list(configured)
    return [CONTROL_COLUMN] if CONTROL_COLUMN in existing else []


def check_order(cells: Mapping[str, Any]) -> None:
    """Raise DataError if a column of control images is empty before one that is not.

    The other images would take its place, and captions may speak of "image 2"."""
    empty_column = None
    for column, cell in cells.items():
        if cell in (None, "", []):
            empty_column = empty_column or column
        elif empty_column is not None:
            raise DataError(f"has no control image in {empty_column}, but one in {column}")


def in_columns(row: Mapping[str, Any], columns: Iterable[str], folder: Path) -> list[Path]:
    """Return the control images that a row of a metadata file names, relative to its folder.

    Raises DataError if a file is missing, or a cell has no names."""
    cells = {column: row.get(column) for column in columns}
    check_order(cells)
    controls = []
    for column, cell in cells.items():
        for name in names_in_cell(cell, column):
            path = folder / name
            if not is_file(path):
                raise DataError(f"has a control image {name} in {column}, which is not in {folder}")
            controls.append(path)
    return controls


def names_in_cell(cell: Any, column: str) -> list[str]:
    """Return the file names in a cell: one, a list of them, or none. Raises DataError."""
    if cell is None or cell == "":
        return []
    if isinstance(cell, str):
        return [cell]
    names: list[Any] = cell if isinstance(cell, list) else [None]
    for name in names:
        if not isinstance(name, str):
            raise DataError(f"has no file names of control images in {column}: {cell!r}")
    return names


def is_file(path: Path) -> bool:
    """Return whether a file exists. A name that is too long does not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def normalized(path: Path) -> Path:
    """Return a path without `..`, to compare it with others. Links are not followed."""
    return Path(os.path.normpath(path))
