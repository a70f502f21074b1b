"""Content hashes: what a cached row, a base model or a data set is known by."""

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

MEMO = "file_hashes.json"
KEY_BYTES = 16


def key_of(*parts: str | bytes) -> bytes:
    """What a row of a store is known by: `digest` as bytes."""
    return bytes.fromhex(digest(*parts))


def digest(*parts: str | bytes) -> str:
    """A 32-digit hash of `parts`, which are kept apart: ("a", "b") and ("ab",) differ."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def file_hashes(paths: Iterable[Path], cache_dir: Path) -> dict[Path, str]:
    """SHA-256 of each file. Files of 1 MB and more are remembered in `cache_dir` by path, size and
    time of change."""
    memo_path = cache_dir / MEMO
    try:
        memo = json.loads(memo_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        memo = {}
    result, news = {}, {}
    for path in paths:
        key = stamp_of(path)
        if key not in memo:
            with path.open("rb") as file:
                news[key] = hashlib.file_digest(file, "sha256").hexdigest()
        result[path] = memo.get(key) or news[key]
        if path.stat().st_size < 1_000_000:
            news.pop(key, None)
    if news:
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_beside(memo_path, json.dumps({**memo, **news}, indent=1))
    return result


def hash_of_files(paths: list[Path], cache_dir: Path) -> str:
    """One hash for the names and contents of `paths`."""
    hashes = file_hashes(paths, cache_dir)
    return digest(*(f"{path.name} {hashes[path]}" for path in paths))


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
    """Whether it was left so long ago that nobody works on it; not if another process has just
    removed it."""
    try:
        return path.stat().st_mtime < time.time() - days * 86400
    except FileNotFoundError:
        return False
