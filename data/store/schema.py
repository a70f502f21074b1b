"""The form of a row on disk: its key, and each tensor as raw bytes with dtype and shape.

Raw bytes, because Arrow has no bfloat16 and decodes nested lists number by number; any torch dtype
comes back exactly. Latents are raw as the VAE gives them (not normalized). Latents and conditioning
that the trainer encodes are fp32.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Features, List, Value
from torch import Tensor

STORED_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
)
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in STORED_DTYPES}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

MEDIA_TENSORS = ("latents", "deviation", "mask")
"""Tensors of a media row; any other tensor in it is conditioning."""
ATTENTION_MASK = "attention_mask"
LENGTHS = "lengths"
"""Name in a batch of the numbers of tokens, which stay on the host."""


class TokenNames(NamedTuple):
    """Names in a batch of what belongs to a tensor of variable length."""

    mask: str
    lengths: str


VariableLengths = Mapping[str, int | None]
"""Tensors whose first dimension is tokens -> padded length, None for that of the longest row."""
FIXED_LENGTHS: VariableLengths = {}
"""No tensors of variable length."""
NO_SIDE = -1
"""Filler for shapes with fewer dimensions than others."""


class TensorSpec(NamedTuple):
    """Dtype and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def has_variable_length(name: str, variable_lengths: VariableLengths) -> bool:
    """Return whether the first dimension of a tensor is tokens, which differ between rows."""
    if name == ATTENTION_MASK:
        return bool(variable_lengths)
    return name in variable_lengths


def token_names(variable_lengths: VariableLengths) -> dict[str, TokenNames]:
    """Return the names of masks and lengths by tensor: only the first tensor's have no prefix."""
    names: dict[str, TokenNames] = {}
    for name in variable_lengths:
        prefix = ""
        if names:
            prefix = f"{name}_"
        mask = prefix + ATTENTION_MASK
        lengths = prefix + LENGTHS
        names[name] = TokenNames(mask, lengths)
    return names


def features(names: list[str]) -> Features:
    """Return the columns of a store whose rows hold these tensors."""
    columns: dict[str, Any] = {"key": Value("binary")}
    for name in names:
        columns |= {
            data_column(name): Value("large_binary"),
            dtype_column(name): Value("string"),
            shape_column(name): List(Value("int32")),
        }
    return Features(columns)


def data_column(name: str) -> str:
    """Return the name of the column with the bytes of a tensor."""
    return f"{name}.data"


def dtype_column(name: str) -> str:
    return f"{name}.dtype"


def shape_column(name: str) -> str:
    return f"{name}.shape"


def to_row(key: bytes, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the cells of a row, by column."""
    row: dict[str, Any] = {"key": key}
    for name, tensor in tensors.items():
        row |= {
            data_column(name): to_bytes(tensor),
            dtype_column(name): DTYPE_NAMES[tensor.dtype],
            shape_column(name): list(tensor.shape),
        }
    return row


def to_bytes(tensor: Tensor) -> bytes:
    """Return the numbers of a tensor as bytes, in C order.

    A view as uint8 works for all dtypes, also those that numpy does not have."""
    contiguous = tensor.detach().cpu().contiguous()
    flat = contiguous.reshape(-1)
    array = flat.view(torch.uint8).numpy()
    return array.tobytes()


class TensorColumn:
    """The tensors of one name in a shard: the position of their bytes in the file, and their specs.

    `offsets` and `num_bytes` have an entry for each row. `specs` holds each spec once;
    `spec_indices` has the index of each row's spec."""

    def __init__(self, table: pa.Table, name: str, address: int):
        """`address`: memory address at which the file is mapped."""
        offsets = []
        num_bytes = []
        for chunk in table.column(data_column(name)).chunks:
            ends = value_ends(chunk)
            starts = ends[:-1]
            offsets.append(starts + data_offset(chunk, address))
            num_bytes.append(np.diff(ends))
        self.offsets = np.concatenate(offsets)
        self.num_bytes = np.concatenate(num_bytes)
        dtypes = table.column(dtype_column(name)).combine_chunks()
        shapes = table.column(shape_column(name)).combine_chunks()
        self._read_specs(dtypes.dictionary_encode(), shapes)

    def _read_specs(self, dtypes: pa.DictionaryArray, shapes: pa.ListArray) -> None:
        """Fill `specs` and `spec_indices`."""
        codes = spec_codes(dtypes, shapes)
        if (codes == codes[:1]).all():  # usual, and sorting takes longer than opening the file
            unique_codes = codes[:1]
            self.spec_indices = np.zeros(len(codes), np.int64)
        else:
            unique_codes, self.spec_indices = np.unique(codes, axis=0, return_inverse=True)
        dtype_names = dtypes.dictionary.to_pylist()
        self.specs = []
        for dtype_index, *sides in unique_codes.tolist():
            dtype = DTYPES[dtype_names[dtype_index]]
            shape = tuple(side for side in sides if side != NO_SIDE)
            self.specs.append(TensorSpec(dtype, shape))

    def spec(self, row: int) -> TensorSpec:
        """Return dtype and shape of a row's tensor."""
        return self.specs[self.spec_indices.item(row)]


def spec_codes(dtypes: pa.DictionaryArray, shapes: pa.ListArray) -> np.ndarray:
    """Return a line of numbers for each row, equal for equal specs.

    It has the index of the dtype, and the sides, followed by NO_SIDE if other rows have more."""
    offsets = shapes.offsets.to_numpy()
    num_sides = np.diff(offsets)
    max_sides = num_sides.max(initial=0)
    is_side = np.arange(max_sides) < num_sides[:, None]
    sides = np.full(is_side.shape, NO_SIDE, np.int32)
    sides[is_side] = shapes.flatten().to_numpy()
    dtype_indices = dtypes.indices.to_numpy()
    return np.column_stack([dtype_indices, sides])


def value_ends(chunk: pa.Array) -> np.ndarray:
    """Return the positions in the data of a binary column at which its values end.

    The first entry is the start of the first value."""
    _, offsets, _ = chunk.buffers()
    first = chunk.offset
    last = first + len(chunk)
    ends = np.frombuffer(offsets, np.int64)
    return ends[first : last + 1]


def data_offset(chunk: pa.Array, address: int) -> int:
    """Return the distance of a chunk's data from a memory address."""
    _, _, data = chunk.buffers()
    if data is None:
        return 0
    return data.address - address
