"""Folders of shards for ComfyUI's LoadTrainingDataset node (comfy_shards.py has their format)."""

import json
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from common.atomic import WriteError, new_folder
from common.errors import DataError
from data.sources.comfy_shards import find_foreign_type

ShardFormat = Literal["pkl", "safetensors"]


class ShardItem(NamedTuple):
    """A sample in the form of a shard: latents (1, C, [F,] h, w), cond (1, L, D), and extras."""

    latents: Tensor
    cond: Tensor
    extras: dict[str, Any]


def write_folder(
    folder: Path,
    samples: Iterable[tuple[Tensor, Tensor, dict[str, Any]]],
    shard_size: int = 1000,
    form: ShardFormat = "pkl",
) -> int:
    """Write samples as ComfyUI does; return their number. One shard is in memory at a time.

    `samples`: latents (C, [F,] h, w), cond (1, L, D), extras. The folder appears when it is
    complete. Raises DataError if it exists already, or if something cannot be written."""
    if shard_size < 1:
        raise DataError(f"a shard of {shard_size} samples is not possible")
    check_is_new(folder)
    remaining = iter(samples)
    num_samples = num_shards = 0
    try:
        with new_folder(folder) as partial_path:
            while True:
                items: list[ShardItem] = []
                for latents, cond, extras in islice(remaining, shard_size):
                    index = num_samples + len(items)
                    items.append(make_item(index, latents, cond, extras))
                if not items:
                    break
                save_shard(partial_path / f"shard_{num_shards:04d}.{form}", items)
                num_samples += len(items)
                num_shards += 1
            if not num_samples:
                raise DataError(f"{folder}: no sample to write")
            write_counts(partial_path, num_samples, num_shards, shard_size)
            check_is_new(folder)
    except WriteError as error:
        raise DataError(str(error)) from error
    return num_samples


def check_is_new(folder: Path) -> None:
    """Raise DataError if a folder exists, because it would be replaced."""
    if os.path.lexists(folder):
        raise DataError(f"{folder} exists already. Choose another folder")


def write_counts(folder: Path, num_samples: int, num_shards: int, shard_size: int) -> None:
    """Write the metadata file of a folder."""
    counts = {"num_samples": num_samples, "num_shards": num_shards, "shard_size": shard_size}
    text = json.dumps(counts, indent=2)
    (folder / "metadata.json").write_text(text, encoding="utf-8")


def make_item(index: int, latents: Tensor, cond: Tensor, extras: dict[str, Any]) -> ShardItem:
    """Return a sample in the form of a shard. Raises DataError if a shard cannot hold it."""
    has_latents_shape = latents.ndim in (3, 4) and latents.shape[0] != 1
    has_cond_shape = cond.ndim == 3 and cond.shape[0] == 1
    if not has_latents_shape or not has_cond_shape:
        shapes = f"latents {tuple(latents.shape)} and cond {tuple(cond.shape)}"
        raise DataError(f"sample {index} has {shapes}, not (C, [F,] h, w) and (1, L, D)")
    foreign_type = find_foreign_type(extras)
    if foreign_type or not all(isinstance(name, str) for name in extras):
        reason = foreign_type or "a name that is not a text"
        raise DataError(f"sample {index} has extras that a shard cannot hold: {reason}")
    compact_extras = {}
    for name, value in extras.items():
        compact_extras[name] = compact_value(value)
    return ShardItem(compact(latents[None]), compact(cond), compact_extras)


def compact_value(value: Any) -> Any:
    """Return a value of the extras with compact tensors."""
    if isinstance(value, Tensor):
        return compact(value)
    if is_tensor_list(value):
        return [compact(tensor) for tensor in value]
    return value


def is_tensor_list(value: Any) -> bool:
    """Return whether a value is a list of tensors, as ComfyUI's reference_latents are."""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(item, Tensor) for item in value)


def compact(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU, with no more memory than it needs.

    torch.save would save all memory that a view is part of."""
    on_host = tensor.detach().cpu().contiguous()
    is_view = on_host.untyped_storage().nbytes() != on_host.nbytes
    return on_host.clone() if is_view else on_host


def save_shard(path: Path, items: list[ShardItem]) -> None:
    """Write one shard. Raises OSError."""
    save = save_pickle if path.suffix == ".pkl" else save_safetensors
    try:
        save(path, items)
    except (RuntimeError, SafetensorError) as error:  # as torch.save raises on a full disk
        raise OSError(str(error)) from error


def save_pickle(path: Path, items: list[ShardItem]) -> None:
    """Write a .pkl shard, byte for byte as ComfyUI does."""
    content = {
        "latents": [{"samples": item.latents} for item in items],
        "conditioning": [[[item.cond, item.extras]] for item in items],
    }
    with path.open("wb") as file:
        torch.save(content, file)


def save_safetensors(path: Path, items: list[ShardItem]) -> None:
    """Write a .safetensors shard. Raises DataError for extras that JSON would change."""
    tensors: dict[str, Tensor] = {}
    plain_extras = []
    for index, item in enumerate(items):
        named_tensors = {f"latents.{index}": item.latents, f"cond.{index}": item.cond}
        plain = {}
        for name, value in item.extras.items():
            if isinstance(value, Tensor):
                named_tensors[f"cond.{index}.{name}"] = value
            elif is_tensor_list(value):
                for position, tensor in enumerate(value):
                    named_tensors[f"cond.{index}.{name}.{position}"] = tensor
            else:
                plain[name] = value
        plain_extras.append(plain)
        for key, tensor in named_tensors.items():
            tensors[key] = tensor.clone()  # the format has no tensors that share memory
    text = json.dumps(plain_extras, default=str, skipkeys=True)
    if json.loads(text) != plain_extras:
        raise DataError(
            "a .safetensors shard keeps no extras except tensors and values that JSON keeps. Write "
            ".pkl shards"
        )
    save_file(tensors, path, {"extras": text})
