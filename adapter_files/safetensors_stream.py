"""Reads and writes .safetensors files tensor by tensor: what is in memory is one tensor, not a
model.

The format: 8 bytes with the header's length, a JSON header, the tensors' bytes. What is written
here is byte for byte what `safetensors.torch.save` writes, whose metadata has no order; here it has
its keys'.
"""

import hashlib
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# name in the format -> dtype, in the format's own order: the tensors of the last dtype come first
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
DTYPE_ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}
HASHED_AT_ONCE = 1 << 20  # bytes
REOPEN_AFTER = 16 << 20  # bytes: what was read of a mapped file stays in memory until it is closed


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorInfo":
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class TensorStore:
    """The tensors of one or several .safetensors files by key, each read when it is asked for."""

    files: list[Path]
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    metadata: dict[Path, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Reads the headers; SafetensorError or OSError, with `filename`, for a file that is
        damaged or is no such."""
        self._file_of: dict[str, Path] = {}
        self._open: tuple[Path | None, Any, int] = (None, None, 0)
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                self.metadata[path] = file.metadata() or {}
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    if part.get_dtype() not in DTYPES:
                        raise SafetensorError(
                            f"{key} is of the dtype {part.get_dtype()}, which torch has no tensors of"
                        )
                    self.infos[key] = TensorInfo(DTYPES[part.get_dtype()], tuple(part.get_shape()))
                    self._file_of[key] = path

    def keys_in(self, path: Path) -> list[str]:
        return [key for key, file in self._file_of.items() if file == path]

    def get(self, key: str) -> Tensor:
        """A copy of one tensor."""
        path, file, read = self._open
        if path != self._file_of[key] or read > REOPEN_AFTER:
            path, read = self._file_of[key], 0
            file = safe_open(path, framework="pt")
        self._open = (path, file, read + self.infos[key].size)
        return file.get_tensor(key).clone()


def header_of(
    infos: dict[str, TensorInfo], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The length and the header of a file, and where each tensor begins after it."""
    content: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    starts, at = {}, 0
    for key in sorted(infos, key=lambda key: (-DTYPE_ORDER[infos[key].dtype], key)):
        info = infos[key]
        starts[key], end = at, at + info.size
        content[key] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": info.shape,
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


def write_tensors(
    path: Path,
    infos: dict[str, TensorInfo],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: dict[str, str],
) -> None:
    """Writes a file of which the names, dtypes and shapes are known before the tensors, which come
    in any order.

    Reads it back, and raises OSError if it does not hold what was written. Metadata that has addnet's hashes gets this
    file's.
    """
    header, starts = header_of(infos, metadata)
    digests: dict[str, bytes] = {}
    with path.open("wb") as file:
        file.write(header)
        for key, tensor in tensors:
            assert TensorInfo.of(tensor) == infos[key], key
            assert key not in digests, key
            file.seek(len(header) + starts[key])
            data = bytes_of(tensor)
            file.write(data)
            digests[key] = hashlib.blake2b(data, digest_size=16).digest()
    assert digests.keys() == infos.keys(), sorted(infos.keys() - digests.keys())
    if HASHES.keys() <= metadata.keys():
        with path.open("r+b") as file:
            hashes = file_hashes(
                file, len(header), header_of(infos, training_metadata(metadata))[0]
            )
            renewed, _ = header_of(infos, {**metadata, **hashes})
            assert len(renewed) == len(header)
            file.seek(0)
            file.write(renewed)
    there = TensorStore([path])
    for key, digest in digests.items():
        if hashlib.blake2b(bytes_of(there.get(key)), digest_size=16).digest() != digest:
            raise OSError(f"{key} does not read back as it was written")


def bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


# in place of the hashes until these are known; as long as they
HASHES = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}


def training_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """What is hashed with a file: programs that edit the rest must not change its hash (sd-scripts,
    train_util)."""
    return {key: value for key, value in metadata.items() if key.startswith("ss_")}


def addnet_hashes(content: bytes) -> dict[str, str]:
    """The hashes by which A1111 and Forge know a file: they do not depend on the metadata
    (sd-scripts, train_util)."""
    tensors_at = 8 + int.from_bytes(content[:8], "little")
    return file_hashes(io.BytesIO(content), tensors_at, content[:tensors_at])


def file_hashes(file: BinaryIO, tensors_at: int, header: bytes) -> dict[str, str]:
    """addnet's hashes of the tensors in `file`, which begin at `tensors_at`, behind `header`."""
    whole, first, last = (
        hashlib.sha256(),
        0x100000,
        0x110000,
    )  # the legacy hash is of these bytes alone
    file.seek(tensors_at)
    while chunk := file.read(HASHED_AT_ONCE):
        whole.update(chunk)
    file.seek(tensors_at + max(0, first - len(header)))
    part = header[first:last] + file.read(max(0, last - max(first, len(header))))
    return {
        "sshs_model_hash": whole.hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(part).hexdigest()[:8],
    }
