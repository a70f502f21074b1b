"""Reading and writing .safetensors files tensor by tensor, so that memory holds one tensor only.

The format: 8 bytes with the length of the header, a JSON header, the bytes of the tensors. The
files are byte for byte those of `safetensors.torch.save`, except that metadata is sorted by key.
"""

import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
"""Name in the format -> dtype, in the format's order: tensors of the last dtype come first."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
DTYPE_ORDER = {dtype: index for index, dtype in enumerate(DTYPES.values())}
HASH_CHUNK_BYTES = 1 << 20
REOPEN_AFTER_BYTES = 16 << 20
"""Bytes read from a mapped file until it is opened again, which frees their memory."""
EMPTY_HASHES = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
"""Metadata with the length of a file's hashes, until they are known."""
LEGACY_HASH_START, LEGACY_HASH_END = 0x100000, 0x110000
"""Bytes of a file that the legacy hash covers."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in the header of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorInfo":
        """Return the entry of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def size(self) -> int:
        """Number of bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


TensorInfos = dict[str, TensorInfo]
"""Key -> entry of the header."""


@dataclass
class OpenFile:
    """A mapped file."""

    path: Path
    file: Any
    num_bytes_read: int = 0

    def get(self, key: str) -> Tensor:
        """Return a copy of one tensor."""
        tensor = self.file.get_tensor(key).clone()
        self.num_bytes_read += tensor.nbytes
        return tensor


@dataclass
class TensorStore:
    """The tensors of one or several .safetensors files by key, read one at a time."""

    files: list[Path]
    infos: TensorInfos = field(default_factory=dict)
    metadata: dict[Path, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the headers.

        Raises SafetensorError or OSError for a file that is damaged or has another format."""
        self._file_of: dict[str, Path] = {}
        self._open_file: OpenFile | None = None
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                self.metadata[path] = file.metadata() or {}
                for key in file.keys():  # noqa: SIM118
                    self.infos[key] = header_info(file, key)
                    self._file_of[key] = path

    def keys_in(self, path: Path) -> list[str]:
        """Return the keys in one file."""
        return [key for key, file in self._file_of.items() if file == path]

    def get(self, key: str) -> Tensor:
        """Return a copy of one tensor."""
        path = self._file_of[key]
        file = self._open_file
        if file is None or file.path != path or file.num_bytes_read > REOPEN_AFTER_BYTES:
            file = OpenFile(path, safe_open(path, framework="pt"))
            self._open_file = file
        return file.get(key)


def header_info(file: Any, key: str) -> TensorInfo:
    """Return a tensor's entry in the header of a mapped file."""
    header = file.get_slice(key)
    dtype_name = header.get_dtype()
    if dtype_name not in DTYPES:
        raise SafetensorError(f"{key} has dtype {dtype_name}, which torch does not have")
    dtype = DTYPES[dtype_name]
    shape = tuple(header.get_shape())
    return TensorInfo(dtype, shape)


class Header(NamedTuple):
    """The start of a file."""

    data: bytes
    """Length of the header, and the header."""
    offsets: dict[str, int]
    """Key -> start of the tensor's bytes after the header."""


def build_header(infos: TensorInfos, metadata: Mapping[str, str]) -> Header:
    """Return the start of a file."""
    content: dict[str, Any] = {}
    if metadata:
        content["__metadata__"] = dict(sorted(metadata.items()))
    offsets: dict[str, int] = {}
    offset = 0
    for key in sorted_keys(infos):
        info = infos[key]
        end = offset + info.size
        content[key] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": info.shape,
            "data_offsets": [offset, end],
        }
        offsets[key] = offset
        offset = end
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    length = len(text).to_bytes(8, "little")
    return Header(length + text, offsets)


def sorted_keys(infos: TensorInfos) -> list[str]:
    """Return the keys in the order in which the format stores their tensors."""

    def position(key: str) -> tuple[int, str]:
        return -DTYPE_ORDER[infos[key].dtype], key

    return sorted(infos, key=position)


def write_tensors(
    path: Path,
    infos: TensorInfos,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a file whose keys, dtypes and shapes are known before its tensors.

    The tensors may come in any order. If the metadata has EMPTY_HASHES, they are replaced by the
    file's hashes. The file is read back; raises OSError if it differs from what was written."""
    header = build_header(infos, metadata)
    digests: dict[str, bytes] = {}
    with path.open("wb") as file:
        file.write(header.data)
        for key, tensor in tensors:
            assert TensorInfo.of(tensor) == infos[key], key
            assert key not in digests, key
            data = tensor_bytes(tensor)
            file.seek(len(header.data) + header.offsets[key])
            file.write(data)
            digests[key] = tensor_digest(data)
    assert digests.keys() == infos.keys(), sorted(infos.keys() - digests.keys())
    if EMPTY_HASHES.keys() <= metadata.keys():
        with path.open("r+b") as file:
            write_hashes(file, infos, metadata, len(header.data))
    store = TensorStore([path])
    for key, digest in digests.items():
        data = tensor_bytes(store.get(key))
        if tensor_digest(data) != digest:
            raise OSError(f"{key} does not read back as it was written")


def write_hashes(
    file: BinaryIO,
    infos: TensorInfos,
    metadata: Mapping[str, str],
    num_header_bytes: int,
) -> None:
    """Replace the hashes in the header of a file."""
    hashed_header = build_header(infos, training_metadata(metadata))
    hashes = file_hashes(file, num_header_bytes, hashed_header.data)
    header = build_header(infos, {**metadata, **hashes})
    assert len(header.data) == num_header_bytes
    file.seek(0)
    file.write(header.data)


def tensor_digest(data: memoryview) -> bytes:
    """Return a hash of a tensor's bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, without a copy if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def training_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata that the hashes cover (sd-scripts, train_util).

    Programs that edit other metadata must not change the hashes."""
    return {key: value for key, value in metadata.items() if key.startswith("ss_")}


def addnet_hashes(content: bytes) -> dict[str, str]:
    """Return the hashes by which A1111 and Forge identify a file (sd-scripts, train_util)."""
    num_header_bytes = 8 + int.from_bytes(content[:8], "little")
    return file_hashes(io.BytesIO(content), num_header_bytes, content[:num_header_bytes])


def file_hashes(file: BinaryIO, num_header_bytes: int, hashed_header: bytes) -> dict[str, str]:
    """Return the hashes of the tensors in `file`, as if they came after `hashed_header`."""
    model_hash = hashlib.sha256()
    file.seek(num_header_bytes)
    while True:
        chunk = file.read(HASH_CHUNK_BYTES)
        if not chunk:
            break
        model_hash.update(chunk)
    start = max(LEGACY_HASH_START, len(hashed_header))
    file.seek(num_header_bytes + start - len(hashed_header))
    legacy_bytes = hashed_header[LEGACY_HASH_START:LEGACY_HASH_END]
    legacy_bytes += file.read(max(0, LEGACY_HASH_END - start))
    return {
        "sshs_model_hash": model_hash.hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy_bytes).hexdigest()[:8],
    }
