"""Checkpoints on disk: `<output_dir>/checkpoints/step_<n>/`, each complete or absent.

A checkpoint is a few files and a manifest with their sizes and hashes, which is written last.
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
    """A checkpoint that could not be written, or that belongs to another run."""


class DamagedError(Exception):
    """A checkpoint whose files are incomplete or changed."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: its step and the content of its files."""

    step: int
    files: dict[str, bytes]
    manifest_hash: str
    """Hash of the manifest, and thereby of all files."""


def save(folder: Path, step: int, files: dict[str, bytes], keep: int) -> None:
    """Write the checkpoint of `step` below `folder`, then delete all but the newest `keep` up to
    this step.

    Checkpoints of later steps stay: they are damaged, or the run would have resumed from them. They
    do not count."""
    path = checkpoint_path(folder, step)
    entries = {name: manifest_entry(data) for name, data in files.items()}
    try:
        with new_folder(path) as partial_path:
            for name, data in files.items():
                (partial_path / name).write_bytes(data)
            manifest = json.dumps({"step": step, "files": entries}, indent=1)
            (partial_path / MANIFEST).write_text(manifest, encoding="utf-8")
    except WriteError as error:
        paths = checkpoint_paths(folder)
        last = "There is no earlier checkpoint"
        if paths:
            last = f"The last good checkpoint is {paths[-1]}"
        raise CheckpointError(
            f"{error}. {last}. Free some space and run the same command again"
        ) from error
    earlier_paths = [old_path for old_path in checkpoint_paths(folder) if old_path <= path]
    unfinished = folder.glob(".step_*")  # of killed processes
    for old_path in [*earlier_paths[:-keep], *unfinished]:
        # a failure, as on NFS, is retried at the next save
        shutil.rmtree(old_path, ignore_errors=True)


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the folders of all checkpoints, oldest first."""
    return sorted(folder.glob("step_*"))


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that is not damaged, and why newer ones were not loaded."""
    messages: list[str] = []
    for path in reversed(checkpoint_paths(folder)):
        try:
            return load(path), messages
        except DamagedError as error:
            messages.append(str(error))
    return None, messages


def load(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises DamagedError if it is damaged, and OSError if it may be readable at
    another time."""
    try:
        data = (path / MANIFEST).read_bytes()
        manifest = json.loads(data)
        files = {name: (path / name).read_bytes() for name in manifest["files"]}
        changed_files = [
            name
            for name, entry in manifest["files"].items()
            if manifest_entry(files[name]) != entry
        ]
        if changed_files:
            raise DamagedError(f"{path} is damaged ({', '.join(changed_files)})")
        return Checkpoint(int(manifest["step"]), files, hashlib.sha256(data).hexdigest())
    except (
        FileNotFoundError,
        NotADirectoryError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise DamagedError(f"{path} is incomplete ({error})") from error


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def manifest_entry(data: bytes) -> dict[str, object]:
    """Return size and hash of a file, as the manifest lists them."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def optimizer_to_bytes(state: dict) -> bytes:
    """Serialize the state of an optimizer."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def optimizer_from_bytes(data: bytes) -> dict:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def tensors_to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Serialize tensors as a .safetensors file."""
    return safetensors.torch.save(tensors, metadata)


def tensors_from_bytes(data: bytes) -> dict[str, Tensor]:
    return safetensors.torch.load(data)
