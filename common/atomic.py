"""Atomic writes: a file or folder is written next to its path, flushed to the disk, then renamed.

Shared files and folders are those of a cache, which several processes may write at the same time.
"""

import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SECONDS_PER_DAY = 86400


class WriteError(RuntimeError):
    """A file that could not be written, for example because the disk is full. The earlier file is
    unchanged."""

    def __init__(self, path: Path, error: OSError):
        super().__init__(f"{path} could not be written: {error}")


def write_file(path: Path, data: bytes | str, is_shared: bool = False) -> None:
    """Replace `path` by `data`. Raises WriteError and leaves `path` unchanged if that fails."""
    with new_file(path, is_shared) as partial_path:
        partial_path.write_bytes(data.encode(errors="replace") if isinstance(data, str) else data)


@contextmanager
def new_file(path: Path, is_shared: bool = False) -> Iterator[Path]:
    """Yield a path to write to, which replaces `path` if the block ends without an error.

    Nothing waits for the disk if the file is shared. Raises WriteError for an OSError, also for one
    in the block."""
    partial_path = path.with_name(f".{path.name}.partial")
    if is_shared:
        partial_path = unique_partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial_path
        if not is_shared:
            flush_file(partial_path)
        os.replace(partial_path, path)
        if not is_shared:
            flush_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
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


def unique_partial_path(path: Path) -> Path:
    """Return a path next to `path` that no other process writes to."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")


def publish_folder(partial_path: Path, path: Path) -> None:
    """Rename a complete shared folder to `path`.

    A folder that exists there has the same content and stays: another process was faster."""
    try:
        partial_path.rename(path)
    except OSError:
        if not path.is_dir():
            raise
        shutil.rmtree(partial_path, ignore_errors=True)


def remove_old(paths: Iterable[Path], days: float) -> None:
    """Remove files and folders that nobody changed for so many days.

    Other processes may do the same. Errors are ignored; the next call tries again."""
    limit = time.time() - days * SECONDS_PER_DAY
    for path in paths:
        with suppress(OSError):
            if path.stat().st_mtime >= limit:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def flush_file(path: Path) -> None:
    """Write the content of a file to the disk."""
    mode = "r+b" if os.name == "nt" else "rb"  # Windows flushes only files opened for writing
    with path.open(mode) as file:
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
