"""Atomic writes: a file or folder is written next to its path, flushed to the disk, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class WriteError(RuntimeError):
    """A file that could not be written, for example because the disk is full. The earlier file is
    unchanged."""

    def __init__(self, path: Path, error: OSError):
        super().__init__(f"{path} could not be written: {error}")


def write_file(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data`. Raises WriteError and leaves `path` unchanged if that fails."""
    with new_file(path) as partial_path:
        partial_path.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which replaces `path` if the block ends without an error.

    Raises WriteError for an OSError, also for one in the block."""
    partial_path = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial_path
        flush_file(partial_path)
        os.replace(partial_path, path)
        flush_folder(path.parent)
    except BaseException as error:
        partial_path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WriteError(path, error) from error
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which replaces `path` if the block ends without an error.

    Raises WriteError for an OSError, also for one in the block. A link, or `.`, is followed and its
    target replaced."""
    path = path.resolve()
    partial_path = path.with_name(f".{path.name}.partial")
    old_path = path.with_name(f".{path.name}.old")
    try:
        shutil.rmtree(partial_path, ignore_errors=True)
        partial_path.mkdir(parents=True)
        yield partial_path
        for file_path in partial_path.rglob("*"):
            if file_path.is_file():
                flush_file(file_path)
        flush_folder(partial_path)
        if path.exists():
            shutil.rmtree(old_path, ignore_errors=True)
            path.rename(old_path)
        partial_path.rename(path)
        shutil.rmtree(old_path, ignore_errors=True)
        flush_folder(path.parent)
    except BaseException as error:
        if old_path.exists() and not path.exists():
            with suppress(OSError):
                old_path.rename(path)
        shutil.rmtree(partial_path, ignore_errors=True)
        if isinstance(error, OSError):
            raise WriteError(path, error) from error
        raise


def flush_file(path: Path) -> None:
    """Write the content of a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, so that a rename survives a power failure. Windows
    cannot do this."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
