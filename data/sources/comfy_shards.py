"""Data that ComfyUI encoded: folders as its SaveTrainingDataset writes them, read and written a
shard at a time.

<folder>/shard_0000.pkl, ...   shard_size samples each, the last one the rest; read in the order of their names
<folder>/metadata.json         num_samples, num_shards, shard_size; not needed for reading

A shard is torch.save of a dict: "latents": [{"samples": (1, C, [F,] h, w)}, ...], raw, as the VAE
gives them, and "conditioning": [[[cond (1, L, D), extras]], ...]. After ResolutionBucket "samples"
is (B, C, [F,] h, w), with B pairs [cond, extras]. Where there is but one conditioning, it is that
of all samples of the shard.

shard_0000.safetensors holds the same without pickle, for sample i = 0, 1, ... of the shard; ComfyUI does not read it:
  latents.<i>        "samples"
  cond.<i>           cond
  cond.<i>.<name>    each of the extras that is a tensor, such as cond.<i>.pooled_output
  metadata           "extras": JSON, a list of the other extras of each sample, such as [{"pooled_output": null}]
"""

import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import DataError, ModelError
from models.base import ModelFamily
from models.latents import with_frame_axis

PATTERNS = ("shard_*.pkl", "shard_*.safetensors")
PLAIN = (Tensor, list, tuple, dict, str, bytes, bool, int, float, complex, type(None))
OLD = "what torch.save did not write (early versions of ComfyUI wrote plain pickles, which may run code)"
MOST_NAMED = 10
T = TypeVar("T")
Form = Literal["pkl", "safetensors"]
Triple = tuple[Tensor, Tensor, dict[str, Any]]  # latents, cond, extras
Notes = defaultdict[
    str, list[int]
]  # what there is to say -> the samples of one shard of which it is true


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample that can be used: its shard's file name, its index in the shard, and the size of its
    latents."""

    shard: str
    index: int
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class ComfySample:
    """One sample: latents raw (C, [F,] h, w), cond as the family's encode_prompt gives it; both may
    be mapped."""

    name: str
    index: int
    latents: Tensor
    cond: dict[str, Tensor]


def is_comfy_folder(folder: Path) -> bool:
    """Whether `folder` holds shards of ComfyUI's."""
    return bool(shards(folder))


def shards(folder: Path) -> list[Path]:
    """The shards in `folder`, in the order of their names, in which ComfyUI reads them."""
    return sorted(file for pattern in PATTERNS for file in folder.glob(pattern))


def scan(folder: Path, family: ModelFamily) -> tuple[list[Entry], list[str], list[str]]:
    """All samples without fault, all faults, all warnings; of a tensor, only shape and type are
    looked at."""
    entries: list[Entry] = []
    warned: list[str] = []
    faults = [] if (files := shards(folder)) else [f"{folder}: no shard ({', '.join(PATTERNS)})"]
    for file in files:
        if file.suffix == ".safetensors" and file.with_suffix(".pkl") in files:
            faults.append(f"{file}: there is a .pkl of the same name; keep one of the two")
        bad, odd = Notes(list), Notes(list)
        try:
            found = _walk(file, family, bad, odd)
            entries += [
                Entry(file.name, sample.index, *sample.latents.shape[-2:]) for sample in found
            ]
        except DataError as error:
            faults.append(str(error))
        faults += _lines(file, bad)
        warned += _lines(file, odd)
    return entries, faults, warned


def samples(folder: Path, family: ModelFamily, shard: str) -> Iterator[ComfySample]:
    """The samples of one shard for which `scan` has entries, in their order; DataError if it cannot
    be read at all."""
    return _walk(folder / shard, family, Notes(list), Notes(list))


def _walk(file: Path, family: ModelFamily, bad: Notes, odd: Notes) -> Iterator[ComfySample]:
    index = 0
    for item, elements in zip(*_load(file), strict=True):
        batch = _attempt(bad, index, _batch, item, family)
        count = 1 if batch is None else len(batch)
        pairs = _attempt(bad, index, _pairs, elements, count) or []
        if batch is not None and pairs and len(elements) > count:
            odd[
                f"{len(elements)} elements of conditioning (of scheduled hooks); the first is taken"
            ].append(index)
        for i, pair in enumerate(pairs, index):
            cond = _attempt(bad, i, family.comfy.read, *pair)
            if batch is not None and cond is not None:
                yield ComfySample(f"{file.name} sample {i}", i, batch[i - index], cond)
        index += count


def _attempt(bad: Notes, index: int, check: Callable[..., T], *args: Any) -> T | None:
    """What `check` returns, or None if it finds a fault, which is noted."""
    try:
        return check(*args)
    except (DataError, ModelError) as error:
        bad[str(error)].append(index)
        return None


def _lines(file: Path, notes: Notes) -> Iterator[str]:
    """What is true of many samples is said once, or a shard of another model would give a thousand
    lines."""
    for message, indices in notes.items():
        named = ", ".join(map(str, indices[:MOST_NAMED]))
        more = f" and {len(indices) - MOST_NAMED} more" * (len(indices) > MOST_NAMED)
        yield f"{file} sample{'s' * (len(indices) > 1)} {named}{more}: {message}"


def _batch(item: Any, family: ModelFamily) -> Tensor:
    """The latents (B, C, [F,] h, w) of one element of a shard. Raises DataError if the family has
    no such latents."""
    latents = item.get("samples") if isinstance(item, dict) else None
    if not _is_dense(latents):
        raise DataError('latents that are not {"samples": a tensor of floating-point numbers}')
    shape, video = tuple(latents.shape), family.media != "image"
    if fault := family.limits.frame_error(shape[2] if len(shape) == 5 else 1):
        raise DataError(f"latents of shape {shape}: {fault}")
    if len(shape) not in (4, 5) or 0 in shape:
        raise DataError(f"latents of shape {shape}, not (1, C, {'F, ' * video}h, w)")
    if shape[1] != family.latent_channels:
        raise DataError(
            f"latents of {shape[1]} channels, of another model; this one's have {family.latent_channels}"
        )
    return with_frame_axis(latents.detach(), video)


def _pairs(elements: Any, count: int) -> list[tuple[Tensor, dict]]:
    """One pair (cond, extras) for each of `count` samples that were saved as one element of a
    shard."""
    if not isinstance(elements, list) or not elements:
        raise DataError("no conditioning")
    for pair in elements:
        if not (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and _is_dense(pair[0])
            and isinstance(pair[1], dict)
        ):
            raise DataError("conditioning that is not [a tensor of floating-point numbers, a dict]")
    elements = elements * count if len(elements) == 1 else elements
    if len(elements) != count and count > 1:
        raise DataError(f"{count} latents in a bucket, but {len(elements)} conditionings")
    return [(cond.detach(), extras) for cond, extras in elements[:count]]


def _is_dense(x: Any) -> TypeGuard[Tensor]:
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.layout == torch.strided
        and not x.is_meta
    )


def _load(file: Path) -> tuple[list, list]:
    """Latents and conditioning of a shard, as many of one as of the other. Raises DataError naming
    the file."""
    shard = _load_tensors(file) if file.suffix == ".safetensors" else _load_pickle(file)
    for what in ("latents", "conditioning"):
        if not isinstance(shard, dict) or not isinstance(shard.get(what), list) or not shard[what]:
            raise DataError(f"{file}: it holds no {what}")
    latents, conditioning = shard["latents"], shard["conditioning"]
    conditioning = conditioning * len(latents) if len(conditioning) == 1 else conditioning
    if len(conditioning) != len(latents):
        raise DataError(f"{file}: {len(latents)} latents, but {len(conditioning)} conditionings")
    return latents, conditioning


def _load_pickle(file: Path) -> Any:
    """What torch.save put into `file`, mapped where possible; nothing in it is executed."""
    try:
        archive = zipfile.is_zipfile(
            file
        )  # as torch.save writes them since 1.6; others cannot be mapped
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of pickle protocols, before an error that says the same
            shard = torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
        foreign = _foreign(shard)  # other libraries may have told torch to trust types of theirs
    except pickle.UnpicklingError as error:
        foreign = (
            match[1]
            if (match := re.search(r"GLOBAL (\S+)", str(error)))
            else "unknown"
            if archive
            else OLD
        )
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(
            f"{file}: damaged, cut short or unreadable ({error or type(error).__name__})"
        ) from error
    if foreign is not None:
        raise DataError(
            f"{file}: refused, since it holds more than tensors and plain containers: {foreign}"
        )
    return shard


def _foreign(value: Any) -> str | None:
    """The type of something in `value` that is neither tensor nor plain, or None; `value` may
    contain itself."""
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if not isinstance(item, PLAIN):
            return f"{type(item).__module__}.{type(item).__name__}"
        if isinstance(item, list | tuple | dict) and id(item) not in seen:
            seen.add(id(item))
            pending.extend([*item.keys(), *item.values()] if isinstance(item, dict) else item)
    return None


def _load_tensors(file: Path) -> dict[str, list]:
    """A .safetensors shard in the form of a .pkl one; its tensors are mapped."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            others = json.loads((opened.metadata() or {})["extras"])
        if strange := [
            key for key in tensors if not re.fullmatch(r"latents\.\d+|cond\.\d+(\..*)?", key)
        ]:
            raise ValueError(f"it holds {strange[0]}")
        latents = [
            {"samples": tensors.pop(f"latents.{i}")}
            for i in range(sum(key[0] == "l" for key in tensors))
        ]
        count = sum(key.count(".") == 1 for key in tensors)
        pairs = [[tensors.pop(f"cond.{i}"), dict(others[i])] for i in range(count)]
        for key, tensor in tensors.items():
            _, i, name = key.split(".", 2)
            pairs[int(i)][1][name] = tensor
    except (OSError, ValueError, TypeError, LookupError, SafetensorError) as error:
        reason = f"without {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{file}: damaged, cut short or not a shard ({reason})") from error
    return {"latents": latents, "conditioning": [[pair] for pair in pairs]}


def write_folder(
    folder: Path, samples: Iterable[Triple], shard_size: int = 1000, form: Form = "pkl"
) -> int:
    """Writes (latents (C, [F,] h, w), cond (1, L, D), extras) as ComfyUI would, one shard in
    memory; returns how many.

    `folder` is there only when it is whole. Raises DataError if it is there already, or for what
    cannot be written.
    """
    if os.path.lexists(folder) or shard_size < 1:
        raise DataError(
            f"{folder} is there already" if shard_size > 0 else f"a shard of {shard_size} samples"
        )
    beside, written, remaining = folder.with_name(f".{folder.name}.partial"), 0, iter(samples)
    shutil.rmtree(beside, ignore_errors=True)  # left by a process that was killed here
    try:
        while items := [
            _item(written + i, *sample) for i, sample in enumerate(islice(remaining, shard_size))
        ]:
            with _told(folder):
                beside.mkdir(parents=True, exist_ok=True)
                _save(beside / f"shard_{written // shard_size:04d}.{form}", items)
            written += len(items)
            items.clear()  # before the next are made
        if not written:
            raise DataError(f"{folder}: no sample to write")
        with _told(folder):
            counts = {
                "num_samples": written,
                "num_shards": -(-written // shard_size),
                "shard_size": shard_size,
            }
            (beside / "metadata.json").write_text(json.dumps(counts, indent=2), encoding="utf-8")
            beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # it has its name by now, if it is whole
    return written


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # RuntimeError: torch.save on a full disk
        raise DataError(f"{folder} could not be written: {error}") from error


def _item(index: int, latents: Tensor, cond: Tensor, extras: dict) -> Triple:
    """A sample as it is saved. Raises DataError for what a shard cannot hold."""
    if latents.ndim not in (3, 4) or latents.shape[0] == 1 or cond.ndim != 3 or cond.shape[0] != 1:
        shapes = f"latents {tuple(latents.shape)} and cond {tuple(cond.shape)}"
        raise DataError(f"sample {index} has {shapes}, not (C, [F,] h, w) and (1, L, D)")
    if (foreign := _foreign(extras)) or not all(isinstance(name, str) for name in extras):
        raise DataError(
            f"sample {index} has extras that no shard holds: {foreign or 'a name that is no text'}"
        )
    extras = {
        name: _compact(value) if isinstance(value, Tensor) else value
        for name, value in extras.items()
    }
    return _compact(latents[None]), _compact(cond), extras


def _compact(tensor: Tensor) -> Tensor:
    """The tensor on the CPU without the rest of what it is a part of, which torch.save would save
    too."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _save(file: Path, items: list[Triple]) -> None:
    if file.suffix == ".pkl":
        latents = [{"samples": samples} for samples, _, _ in items]
        with file.open("wb") as opened:
            torch.save(
                {
                    "latents": latents,
                    "conditioning": [[[cond, extras]] for _, cond, extras in items],
                },
                opened,
            )
            return
    tensors: dict[str, Tensor] = {}
    others = []
    for i, (samples, cond, extras) in enumerate(items):
        own = {name: value for name, value in extras.items() if isinstance(value, Tensor)}
        others.append({name: value for name, value in extras.items() if name not in own})
        named = {
            f"latents.{i}": samples,
            f"cond.{i}": cond,
            **{f"cond.{i}.{n}": value for n, value in own.items()},
        }
        tensors |= {
            key: value.clone() for key, value in named.items()
        }  # the format has no tensors that share memory
    text = json.dumps(others, default=str, skipkeys=True)
    if json.loads(text) != others:
        raise DataError(
            "a .safetensors shard keeps no extras but tensors and what is the same in JSON; write .pkl"
        )
    save_file(tensors, file, {"extras": text})
