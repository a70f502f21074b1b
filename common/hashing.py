"""Hashes of contents, of files, and of sets of files."""

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path

from common.announce import announced
from common.atomic import write_file

REMEMBERED_HASHES = "file_hashes.json"
MIN_REMEMBERED_BYTES = 1_000_000
"""Size of a file whose hash is worth remembering."""


def hash_of(*contents: str | bytes) -> str:
    """Return a hash of 32 hex digits. The boundaries count: ("a", "b") and ("ab",) differ."""
    state = hashlib.blake2b(digest_size=16)
    for content in contents:
        data = content.encode() if isinstance(content, str) else content
        length = len(data).to_bytes(8, "little")
        state.update(length)
        state.update(data)
    return state.hexdigest()


def hash_number(*values: str | int) -> int:
    """Return a hash of 64 bits. The boundaries count, and a number differs from its text."""
    state = hashlib.blake2b(digest_size=8)
    for value in values:
        if isinstance(value, int):
            state.update(struct.pack("<Q", value))
        else:
            state.update(value.encode() + b"\0")
    return int.from_bytes(state.digest(), "little")


def file_stamp(path: Path) -> str:
    """Return a text that changes when the content of a file may have changed: path, size, time."""
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(paths: Iterable[Path], cache_dir: Path) -> dict[Path, str]:
    """Return the SHA-256 of each file. `cache_dir` remembers those of large files."""
    memory_path = cache_dir / REMEMBERED_HASHES
    remembered = read_remembered(memory_path)
    hashes: dict[Path, str] = {}
    new_hashes: dict[str, str] = {}
    for path in paths:
        stamp = file_stamp(path)
        if stamp in remembered:
            hashes[path] = remembered[stamp]
            continue
        with announced(f"hashing {path.name}, which is done once"):
            hashes[path] = sha256_of_file(path)
        if path.stat().st_size >= MIN_REMEMBERED_BYTES:
            new_hashes[stamp] = hashes[path]
    if new_hashes:
        text = json.dumps({**remembered, **new_hashes}, indent=1)
        write_file(memory_path, text, is_shared=True)
    return hashes


def read_remembered(path: Path) -> dict[str, str]:
    """Return the remembered hashes; none if the file does not exist or is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def hash_of_files(paths: list[Path], cache_dir: Path) -> str:
    """Return one hash of the names and contents of files."""
    hashes = file_hashes(paths, cache_dir)
    contents = []
    for path in paths:
        contents.append(f"{path.name} {hashes[path]}")
    return hash_of(*contents)
