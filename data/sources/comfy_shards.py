"""Folders of data that ComfyUI encoded, as its SaveTrainingDataset node writes them.

<folder>/shard_0000.pkl, ...   shard_size samples each, fewer in the last one; read by name order
<folder>/metadata.json         num_samples, num_shards, shard_size; not needed for reading

A shard is torch.save of a dict: "latents": [{"samples": (1, C, [F,] h, w)}, ...], raw, as the VAE
gives them, and "conditioning": [[[cond (1, L, D), extras]], ...]. After ResolutionBucket "samples"
is (B, C, [F,] h, w), with B pairs [cond, extras]. A single conditioning belongs to all samples of
the shard.

shard_0000.safetensors holds the same without pickle; ComfyUI does not read it. For sample i = 0, 1,
... of the shard it has:
  latents.<i>        "samples"
  cond.<i>           cond
  cond.<i>.<name>    each of the extras that is a tensor, such as cond.<i>.pooled_output
  metadata           "extras": JSON, a list of the other extras of each sample, such as
                     [{"pooled_output": null}]
"""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import DataError, ModelError
from models.base import ModelFamily
from models.controls import control_latents
from models.latents import with_frame_axis

SHARD_PATTERNS = ("shard_*.pkl", "shard_*.safetensors")
TENSOR_KEY = re.compile(r"latents\.\d+|cond\.\d+(\..*)?")
"""Keys of a .safetensors shard."""
PLAIN_TYPES = (Tensor, list, tuple, dict, str, bytes, bool, int, float, complex, type(None))
OLD_PICKLE = (
    "a pickle that torch.save did not write (early versions of ComfyUI wrote such files, which may "
    "run code)"
)
MAX_LISTED_SAMPLES = 10
Checked = TypeVar("Checked")


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A usable sample: file name of its shard, index in the shard, and size of its latents."""

    shard: str
    index: int
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class ComfySample:
    """One sample: raw latents (C, [F,] h, w), and cond as the family's encode_prompt makes it.

    Both may be mapped from the file."""

    name: str
    index: int
    latents: Tensor
    cond: dict[str, Tensor]


class FolderScan(NamedTuple):
    """The usable samples of a folder, the errors of the others, and warnings."""

    entries: list[ShardEntry]
    errors: list[str]
    warnings: list[str]


class LoadedShard(NamedTuple):
    """The content of a shard, with equally many elements of both."""

    latents: list[Any]
    conditioning: list[Any]


class SampleMessages:
    """Messages about the samples of one shard.

    Equal messages become one line: a shard of another model has the same error a thousand times."""

    def __init__(self) -> None:
        self.indices: dict[str, list[int]] = {}

    def add(self, message: str, index: int) -> None:
        self.indices.setdefault(message, []).append(index)

    def catch(self, index: int, check: Callable[..., Checked], *values: Any) -> Checked | None:
        """Return the result of `check`; add its error and return None if it raises one."""
        try:
            return check(*values)
        except (DataError, ModelError) as error:
            self.add(str(error), index)
            return None

    def lines(self, path: Path) -> list[str]:
        """Return a line for each message, with the samples that it is about."""
        lines = []
        for message, indices in self.indices.items():
            noun = "sample" if len(indices) == 1 else "samples"
            shown_indices = indices[:MAX_LISTED_SAMPLES]
            listed = ", ".join(map(str, shown_indices))
            if len(indices) > MAX_LISTED_SAMPLES:
                listed += f" and {len(indices) - MAX_LISTED_SAMPLES} more"
            lines.append(f"{path} {noun} {listed}: {message}")
        return lines


def is_comfy_folder(folder: Path) -> bool:
    """Return whether a folder holds shards of ComfyUI."""
    return bool(shard_paths(folder))


def shard_paths(folder: Path) -> list[Path]:
    """Return the shards in a folder, in the order of their names, in which ComfyUI reads them."""
    paths: list[Path] = []
    for pattern in SHARD_PATTERNS:
        paths += folder.glob(pattern)
    return sorted(paths)


def scan_folder(folder: Path, family: ModelFamily) -> FolderScan:
    """Return all samples of a folder. Only shapes and types of tensors are looked at."""
    scan = FolderScan([], [], [])
    paths = shard_paths(folder)
    if not paths:
        scan.errors.append(f"{folder}: no shard ({', '.join(SHARD_PATTERNS)})")
    for path in paths:
        if path.suffix == ".safetensors" and path.with_suffix(".pkl") in paths:
            scan.errors.append(f"{path}: a .pkl file has the same name; keep one of the two")
        errors, warned = SampleMessages(), SampleMessages()
        try:
            for sample in iterate_shard(path, family, errors, warned):
                height, width = sample.latents.shape[-2:]
                scan.entries.append(ShardEntry(path.name, sample.index, height, width))
        except DataError as error:
            scan.errors.append(str(error))
        scan.errors.extend(errors.lines(path))
        scan.warnings.extend(warned.lines(path))
    return scan


def read_samples(folder: Path, family: ModelFamily, shard: str) -> Iterator[ComfySample]:
    """Yield the usable samples of one shard, in their order.

    Raises DataError if the shard cannot be read at all."""
    return iterate_shard(folder / shard, family, SampleMessages(), SampleMessages())


def iterate_shard(
    path: Path, family: ModelFamily, errors: SampleMessages, warned: SampleMessages
) -> Iterator[ComfySample]:
    """Yield the usable samples of a shard, and add the errors and warnings of all samples."""
    index = 0
    shard = load_shard(path)
    for item, elements in zip(shard.latents, shard.conditioning, strict=True):
        batch = errors.catch(index, check_latents, item, family)
        count = 1 if batch is None else len(batch)
        pairs = errors.catch(index, check_conditioning, elements, count) or []
        if batch is not None and pairs and len(elements) > count:
            message = f"{len(elements)} elements of conditioning (of scheduled hooks)"
            warned.add(f"{message}; the first is used", index)
        for offset, (embeds, extras) in enumerate(pairs):
            sample_index = index + offset
            cond = errors.catch(sample_index, read_conditioning, family, embeds, extras)
            if batch is not None and cond is not None:
                name = f"{path.name} sample {sample_index}"
                yield ComfySample(name, sample_index, batch[offset], cond)
        index += count


def read_conditioning(family: ModelFamily, embeds: Tensor, extras: dict) -> dict[str, Tensor]:
    """Return the conditioning of a sample. Raises DataError or ModelError if the model does not take
    it."""
    cond = family.comfy.read(embeds, extras)
    controls = control_latents(cond)
    error = family.controls.count_error(len(controls)) if controls else None
    if error is not None:
        raise DataError(error)
    limits = family.limits
    step = limits.pixel_step // limits.latent_step
    for latents in controls:
        num_channels, *sides = latents.shape
        is_divisible = all(side % step == 0 for side in sides)
        if num_channels != family.latent_channels or not is_divisible:
            raise DataError(
                f"reference_latents of shape {tuple(latents.shape)}; expected "
                f"{family.latent_channels} channels, and sides that are multiples of {step}"
            )
    return cond


def check_latents(item: Any, family: ModelFamily) -> Tensor:
    """Return the latents (B, C, [F,] h, w) of one element of a shard.

    Raises DataError if they do not fit the family."""
    latents = item.get("samples") if isinstance(item, dict) else None
    if not is_dense(latents):
        raise DataError('latents that are not {"samples": a tensor of floating-point numbers}')
    shape = tuple(latents.shape)
    has_frames = len(shape) == 5
    is_video = family.media != "image"
    error = family.limits.frame_error(shape[2] if has_frames else 1)
    if error:
        raise DataError(f"latents of shape {shape}: {error}")
    if len(shape) not in (4, 5) or 0 in shape:
        expected = "(1, C, F, h, w)" if is_video else "(1, C, h, w)"
        raise DataError(f"latents of shape {shape}, not {expected}")
    num_channels = shape[1]
    if num_channels != family.latent_channels:
        raise DataError(
            f"latents of {num_channels} channels, of another model; those of this model have "
            f"{family.latent_channels}"
        )
    return with_frame_axis(latents.detach(), is_video)


def check_conditioning(elements: Any, count: int) -> list[tuple[Tensor, dict]]:
    """Return a pair (cond, extras) for each of the `count` samples of one element of a shard."""
    if not isinstance(elements, list) or not elements:
        raise DataError("no conditioning")
    for element in elements:
        if not is_pair(element):
            raise DataError("conditioning that is not [a tensor of floating-point numbers, a dict]")
    if len(elements) == 1:
        elements = elements * count
    if len(elements) != count and count > 1:
        raise DataError(f"{count} latents in a bucket, but {len(elements)} conditionings")
    return [(cond.detach(), extras) for cond, extras in elements[:count]]


def is_pair(element: Any) -> bool:
    """Return whether a value is [a tensor of floating-point numbers, a dict]."""
    is_sequence = isinstance(element, list | tuple)
    if not is_sequence or len(element) != 2:
        return False
    cond, extras = element
    return is_dense(cond) and isinstance(extras, dict)


def is_dense(value: Any) -> TypeGuard[Tensor]:
    """Return whether a value is a tensor of floating-point numbers in memory."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and not value.is_meta
    )


def load_shard(path: Path) -> LoadedShard:
    """Load a shard. Raises DataError that names the file."""
    content = load_safetensors(path) if path.suffix == ".safetensors" else load_pickle(path)
    for name in LoadedShard._fields:
        values = content.get(name) if isinstance(content, dict) else None
        if not isinstance(values, list) or not values:
            raise DataError(f"{path}: no {name}")
    latents = content["latents"]
    conditioning = content["conditioning"]
    if len(conditioning) == 1:
        conditioning = conditioning * len(latents)
    if len(conditioning) != len(latents):
        counts = f"{len(latents)} latents, but {len(conditioning)} conditionings"
        raise DataError(f"{path}: {counts}")
    return LoadedShard(latents, conditioning)


def load_pickle(path: Path) -> Any:
    """Load a file of torch.save, mapped where possible. No code in it is executed."""
    is_archive = False
    try:
        is_archive = zipfile.is_zipfile(path)  # the format since torch 1.6; older ones have no map
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; the error says the same
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        foreign_type = find_foreign_type(content)  # other libraries may make torch trust types
    except pickle.UnpicklingError as error:
        foreign_type = rejected_type(error, is_archive)
    except Exception as error:  # a damaged pickle can raise anything
        reason = error or type(error).__name__
        raise DataError(f"{path}: damaged, cut short or unreadable ({reason})") from error
    if foreign_type is not None:
        raise DataError(
            f"{path}: not loaded, because it holds more than tensors and plain containers: "
            f"{foreign_type}"
        )
    return content


def rejected_type(error: pickle.UnpicklingError, is_archive: bool) -> str:
    """Return the type that kept torch from loading a file."""
    match = re.search(r"GLOBAL (\S+)", str(error))
    if match:
        return match[1]
    return "unknown" if is_archive else OLD_PICKLE


def find_foreign_type(value: Any) -> str | None:
    """Return the type of any object in a value that is neither a tensor nor plain.

    The value may contain itself."""
    waiting = [value]
    visited: set[int] = set()
    while waiting:
        item = waiting.pop()
        item_type = type(item)
        if not isinstance(item, PLAIN_TYPES):
            return f"{item_type.__module__}.{item_type.__name__}"
        if id(item) in visited:
            continue
        if isinstance(item, dict):
            waiting.extend(item.keys())
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
        else:
            continue
        visited.add(id(item))
    return None


def load_safetensors(path: Path) -> dict[str, list]:
    """Load a .safetensors shard in the form of a .pkl shard. Its tensors are mapped."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        plain_extras = json.loads(metadata["extras"])
        return arrange_tensors(tensors, plain_extras)
    except (OSError, ValueError, TypeError, LookupError, SafetensorError) as error:
        reason = f"without {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path}: damaged, cut short or not a shard ({reason})") from error


def arrange_tensors(tensors: dict[str, Tensor], plain_extras: Any) -> dict[str, list]:
    """Return the tensors of a .safetensors shard in the form of a .pkl shard.

    Raises ValueError, TypeError or LookupError if they do not fit together."""
    for key in tensors:
        if not TENSOR_KEY.fullmatch(key):
            raise ValueError(f"it holds {key}")
    num_latents = sum(key.startswith("latents.") for key in tensors)
    latents = [{"samples": tensors.pop(f"latents.{index}")} for index in range(num_latents)]
    num_pairs = sum(key.count(".") == 1 for key in tensors)
    conditioning: list[Any] = []
    for index in range(num_pairs):
        cond = tensors.pop(f"cond.{index}")
        pair = [cond, dict(plain_extras[index])]
        conditioning.append([pair])
    for key, tensor in sorted(tensors.items(), key=by_position):
        _, index_text, name = key.split(".", 2)
        (pair,) = conditioning[int(index_text)]
        list_name, _, position = name.rpartition(".")
        if list_name and position.isdigit():
            pair[1].setdefault(list_name, []).append(tensor)
        else:
            pair[1][name] = tensor
    return {"latents": latents, "conditioning": conditioning}


def by_position(item: tuple[str, Tensor]) -> tuple[str, int]:
    """Return the order of a tensor among the others.

    Those of a list are ordered by the number at the end of their keys."""
    key, _ = item
    name, _, digits = key.rpartition(".")
    if not digits.isdigit():
        return key, 0
    number = int(digits)
    order = (name, number)
    return order
