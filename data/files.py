"""Small things about files that several parts of the data need."""

import os
import socket
import time
from pathlib import Path


def stamp_of(path: Path) -> str:
    """What changes when a file's content may have: its path, size and time of change."""
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def write_beside(path: Path, text: str) -> None:
    """Writes `path` so that it is there as a whole or not at all."""
    beside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def is_old(path: Path, days: float) -> bool:
    """Whether it was left so long ago that nobody works on it; not if another process has just removed it."""
    try:
        return path.stat().st_mtime < time.time() - days * 86400
    except FileNotFoundError:
        return False
