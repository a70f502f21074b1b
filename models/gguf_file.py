"""Reading of GGUF files. The package `gguf` is imported only here, when a file is read."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.errors import ModelError, error_list
from models.gguf_formats import BLOCKS, GGUF_FORMATS
from models.gguf_names import transformers_name
from models.quantized_weight import Format, StoredTensors
from models.weight_file import PLAIN_VALUES, WeightFile

if TYPE_CHECKING:
    from gguf import ReaderTensor

PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types whose values are not quantized, by their names in the gguf package."""
PARSING_ERRORS = (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError)
"""Errors that the package raises for files that are broken."""
ARCHITECTURE_FIELD = "general.architecture"
MAGIC = b"GGUF"
SHAPE_FIELD = "comfy.gguf.orig_shape."
"""Beginning of the fields with the shapes of weights that ComfyUI-GGUF's converter reshaped."""


def open_gguf(path: Path) -> Any:
    """Return the gguf package's reader of a file. Raises ModelError."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            f"{path}: GGUF files need the package gguf. Install it with: pip install gguf"
        ) from error
    try:
        return GGUFReader(path)
    except PARSING_ERRORS as error:
        raise ModelError(f"{path}: {reading_error(path)}") from error


def reading_error(path: Path) -> str:
    """Return why the package could not read a file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
            num_bytes = file.seek(0, 2)
    except OSError as error:
        return f"could not be read: {error.strerror}"
    if start != MAGIC:
        return "is not a GGUF file, although its name ends in .gguf"
    return f"is incomplete or damaged ({num_bytes:,} bytes). Download it again"


def gguf_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a GGUF file. Raises ModelError.

    Types that cannot be read are refused here, all at once."""
    reader = open_gguf(path)
    shapes = {}
    errors = {}
    for tensor in reader.tensors:
        name = tensor_name(reader, tensor)
        shapes[name] = tensor_shape(reader, tensor)
        type_name = tensor.tensor_type.name
        if type_name not in GGUF_FORMATS and type_name not in PLAIN_DTYPES:
            errors[type_name] = f"{type_name}, for example {tensor.name}"
    if errors:
        readable = ", ".join([*PLAIN_DTYPES, *GGUF_FORMATS])
        listed = error_list(f"{path}: has tensors of unsupported types", [*errors.values()])
        raise ModelError(f"{listed}\nSupported types: {readable}")
    return shapes


def tensor_name(reader: Any, tensor: "ReaderTensor") -> str:
    """Return the name of a tensor, for a text encoder transformers' name."""
    field = reader.get_field(ARCHITECTURE_FIELD)
    if field is None:
        return tensor.name
    architecture = field.contents()
    return transformers_name(tensor.name, str(architecture))


def tensor_shape(reader: Any, tensor: "ReaderTensor") -> tuple[int, ...]:
    """Return the shape of a tensor's values.

    A file has it in reverse order, and perhaps a field with another shape."""
    field = reader.get_field(SHAPE_FIELD + tensor.name)
    if field is not None:
        return tuple(field.contents())
    sizes = tensor.shape.tolist()
    return tuple(reversed(sizes))


def has_quantized_tensors(path: Path) -> bool:
    """Return whether a GGUF file has weights that are quantized. Raises ModelError."""
    reader = open_gguf(path)
    return any(tensor.tensor_type.name in GGUF_FORMATS for tensor in reader.tensors)


class GgufFile(WeightFile):
    """An open GGUF file, which is mapped into memory."""

    def __init__(self, path: Path):
        self.reader = open_gguf(path)
        self.tensors: dict[str, ReaderTensor] = {}
        for tensor in self.reader.tensors:
            name = tensor_name(self.reader, tensor)
            self.tensors[name] = tensor
        self.is_quantized = any(self.format(key) is not None for key in self.tensors)

    def close(self) -> None:
        self.tensors = {}
        self.reader = None

    def format(self, key: str) -> Format | None:
        return GGUF_FORMATS.get(self.tensors[key].tensor_type.name)

    def stored(self, key: str, rows: slice) -> StoredTensors:
        tensor = self.tensors[key]
        if self.format(key) is None:
            values = self._values(tensor)
            return {PLAIN_VALUES: values[rows]}
        data = tensor.data[rows].copy()
        return {BLOCKS: torch.from_numpy(data)}

    def empty(self, key: str, num_rows: int) -> StoredTensors:
        num_bytes = self.tensors[key].data.shape[-1]
        return {BLOCKS: torch.empty(num_rows, num_bytes, dtype=torch.uint8)}

    def _values(self, tensor: "ReaderTensor") -> Tensor:
        """Return the values of a plain tensor."""
        type_name = tensor.tensor_type.name
        dtype = PLAIN_DTYPES[type_name]
        shape = tensor_shape(self.reader, tensor)
        data = tensor.data.copy()
        values = torch.from_numpy(data).view(dtype)
        return values.view(shape)

    def row_shape(self, key: str) -> Iterable[int]:
        return tensor_shape(self.reader, self.tensors[key])[1:]
