"""Batches from rows of a store: stacked, or padded where rows have different numbers of tokens."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import DataError
from data.store.schema import (
    TensorSpec,
    VariableLengths,
    has_variable_length,
    token_names,
)
from data.store.shard import StoredRow


class PaddedTensors(NamedTuple):
    """A batch (B, tokens, ...) filled up with zeros, and the number of tokens of each row."""

    tensor: Tensor
    lengths: list[int]


def collate(rows: list[StoredRow], variable_lengths: VariableLengths) -> dict[str, Any]:
    """Return all tensors of the rows, one batch per name.

    If some have variable lengths, there are also their attention masks and `lengths`: the numbers
    of tokens."""
    names = rows[0].shard.columns
    batch: dict[str, Any] = {}
    for name in names:
        if not has_variable_length(name, variable_lengths):
            batch[name] = stack_rows(rows, name)
    for name, own_names in token_names(variable_lengths).items():
        if name not in names:
            continue
        length = variable_lengths[name]
        padded = pad_rows(rows, name, length)
        batch[name] = padded.tensor
        batch[own_names.lengths] = tuple(padded.lengths)
        mask = length_mask(padded)
        if own_names.mask in names:  # a mask is stored
            padded_mask = pad_rows(rows, own_names.mask, mask.shape[1])
            mask = padded_mask.tensor
        batch[own_names.mask] = mask
    return batch


def length_mask(padded: PaddedTensors) -> Tensor:
    """Return (B, tokens), true where a row has tokens."""
    positions = torch.arange(padded.tensor.shape[1])
    return positions < torch.tensor(padded.lengths)[:, None]


def stack_rows(rows: list[StoredRow], name: str) -> Tensor:
    """Read one tensor of each row, all of the same shape and dtype, into one batch.

    The bytes go from the page cache directly to their position in the batch. Raises DataError if
    shapes or dtypes differ."""
    spec = rows[0].spec(name)
    check_specs(rows, name, spec)
    num_bytes = spec.num_bytes
    memory = np.empty(len(rows) * num_bytes, np.uint8)
    target = memory.data
    start = 0
    for row in rows:
        end = start + num_bytes
        row.read_into(name, target[start:end])
        start = end
    shape = (len(rows), *spec.shape)
    return view_bytes(memory, TensorSpec(spec.dtype, shape))


def check_specs(rows: list[StoredRow], name: str, expected: TensorSpec) -> None:
    """Raise DataError unless the tensors of all rows have this shape and dtype."""
    description = str(expected)
    for row in rows:
        if row.spec(name) != expected:
            message = difference(name, description, row)
            raise DataError(message)


def pad_rows(rows: list[StoredRow], name: str, length: int | None) -> PaddedTensors:
    """Read one tensor (tokens, ...) of each row into one batch, filled up with zeros.

    `length`: tokens in the batch; None for those of the longest row, at least one."""
    specs = [row.spec(name) for row in rows]
    lengths = [spec.shape[0] for spec in specs]
    if length is None:
        length = max(1, *lengths)
    dtype, (_, *sides) = specs[0]
    token = TensorSpec(dtype, tuple(sides))
    check_padded_specs(rows, name, length, token)
    row_bytes = length * token.num_bytes
    memory = np.zeros((len(rows), row_bytes), np.uint8)
    for line, num_tokens, row in zip(memory, lengths, rows, strict=True):
        num_bytes = num_tokens * token.num_bytes
        row.read_into(name, line.data[:num_bytes])
    shape = (len(rows), length, *token.shape)
    batch = view_bytes(memory.reshape(-1), TensorSpec(dtype, shape))
    return PaddedTensors(batch, lengths)


def check_padded_specs(rows: list[StoredRow], name: str, length: int, token: TensorSpec) -> None:
    """Raise DataError unless all rows have at most `length` tokens with this shape and dtype."""
    for row in rows:
        dtype, (num_tokens, *sides) = row.spec(name)
        row_token = TensorSpec(dtype, tuple(sides))
        if row_token != token or num_tokens > length:
            limit = TensorSpec(token.dtype, (length, *token.shape))
            message = difference(name, f"{limit} at most", row)
            raise DataError(message)


def view_bytes(memory: np.ndarray, spec: TensorSpec) -> Tensor:
    """Return a tensor that shares the memory of an array of bytes."""
    dtype, shape = spec
    if not len(memory):
        return torch.empty(shape, dtype=dtype)
    flat = torch.from_numpy(memory).view(dtype)
    return flat.view(shape)


def difference(name: str, expected: str, row: StoredRow) -> str:
    """Return the message about a tensor that does not fit the others of a batch.

    `expected`: description of tensors that fit."""
    spec = row.spec(name)
    folder = row.shard.path.parent
    return f"{name} of one batch differ: {expected} and {spec}, the latter in {folder}"
