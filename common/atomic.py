"""Files that are there whole or not at all: written beside, flushed to the disk, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class WriteError(RuntimeError):
    """Something could not be written, because the disk is full, say; what was there before is unchanged."""

    def __init__(self, path: Path, error: OSError):
        super().__init__(f"{path} could not be written: {error}")


def write_file(path: Path, data: bytes | str) -> None:
    """Replaces `path` by `data`; raises WriteError if that fails, and then `path` is as it was."""
    with new_file(path) as beside:
        beside.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path`, replacing what was there, only if the block ends without an error.

    Raises WriteError for an OSError, in the block too.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WriteError(path, error) from error
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `path`, replacing what was there, only if the block ends without an error.

    Raises WriteError for an OSError, in the block too. Of a link, and of `.`, the folder that it leads to is replaced.
    """
    path = path.resolve()
    beside, old = (path.with_name(f".{path.name}.{ending}") for ending in ("partial", "old"))
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        sync_folder(beside)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        beside.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        sync_folder(path.parent)
    except BaseException as error:
        if old.exists() and not path.exists():
            with suppress(OSError):
                old.rename(path)
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError):
            raise WriteError(path, error) from error
        raise


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
