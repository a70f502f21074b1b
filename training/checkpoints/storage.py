"""Checkpoints: `<output_dir>/checkpoints/step_<n>/`, each complete or absent, the newest valid one found again.

A checkpoint is a few named files and a manifest with their sizes and hashes, written last. The schedule and all
randomness are functions of the step (data/schedule.py), so there is no other state to keep.
"""

import hashlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from common.atomic import WriteError, new_folder

MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or does not belong to this run."""


class DamagedError(Exception):
    """A checkpoint that is not as it was written."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint read back: its step and the content of its files."""

    step: int
    files: dict[str, bytes]
    digest: str
    """Of the manifest, and so of all files."""


def save(folder: Path, step: int, files: dict[str, bytes], keep: int) -> None:
    """Writes the checkpoint of `step` below `folder`, then deletes earlier ones: `keep` are left.

    Later ones stay: they are damaged, or the run would have gone on from them, and must not push valid ones out.
    """
    path = folder_of(folder, step)
    about = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    try:
        with new_folder(path) as beside:
            for name, data in files.items():
                (beside / name).write_bytes(data)
            (beside / MANIFEST).write_text(json.dumps({"step": step, "files": about}, indent=1), encoding="utf-8")
    except WriteError as error:
        kept = existing(folder)
        previous = f"The last good checkpoint is {kept[-1]}" if kept else "There is no earlier checkpoint"
        raise CheckpointError(f"{error}. {previous}. Make room and run the same command again") from error
    stale = [other for other in existing(folder) if other <= path][:-keep]
    for old in [*stale, *folder.glob(".step_*")]:  # those with a dot: of kills
        shutil.rmtree(old, ignore_errors=True)  # what cannot be removed now, by a file system's whim, is next time


def existing(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(folder.glob("step_*"))


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are all as they were written, and why newer ones were passed over."""
    damaged: list[str] = []
    for path in reversed(existing(folder)):
        try:
            return read(path), damaged
        except DamagedError as error:
            damaged.append(str(error))
    return None, damaged


def read(path: Path) -> Checkpoint:
    """Raises DamagedError if anything is not as it was written, and OSError for what may be well another time."""
    try:
        data = (path / MANIFEST).read_bytes()
        manifest = json.loads(data)
        files = {name: (path / name).read_bytes() for name in manifest["files"]}
        bad = [name for name, about in manifest["files"].items() if not is_whole(files[name], about)]
        if bad:
            raise DamagedError(f"{path} is damaged ({', '.join(bad)})")
        return Checkpoint(int(manifest["step"]), files, hashlib.sha256(data).hexdigest())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is not complete ({error})") from error


def folder_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def is_whole(data: bytes, about: dict) -> bool:
    return len(data) == about["size"] and hashlib.sha256(data).hexdigest() == about["sha256"]


def to_bytes(state: dict) -> bytes:
    """An optimizer's state as a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> dict:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def tensors_to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """An adapter's weights as a .safetensors file."""
    return safetensors.torch.save(tensors, metadata)


def tensors_from_bytes(data: bytes) -> dict[str, Tensor]:
    return safetensors.torch.load(data)
