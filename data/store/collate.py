"""From rows of a store to the tensors of a batch: stacked, or padded where rows have different
numbers of tokens."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.errors import DataError
from data.store.schema import LENGTHS, MASK, Ragged, is_ragged

if TYPE_CHECKING:
    from data.store.part import Part


def batch_of(found: "list[tuple[Part, int]]", ragged: Ragged) -> dict[str, Any]:
    """All tensors of those rows of parts, each name's as one batch. If some are `ragged`, with an attention_mask, and
    with `lengths`: the numbers of tokens of the first of these, which stay on the host."""
    names = found[0][0].columns
    batch: dict[str, Any] = {
        name: stacked(found, name) for name in names if not is_ragged(name, ragged)
    }
    mask = None
    for name in [name for name in ragged if name in names]:
        batch[name], lengths = padded(found, name, ragged[name])
        if mask is None:
            batch[LENGTHS] = tuple(lengths)
            mask = torch.arange(batch[name].shape[1]) < torch.tensor(lengths)[:, None]
    if mask is not None and MASK not in batch:
        batch[MASK] = padded(found, MASK, mask.shape[1])[0] if MASK in names else mask
    return batch


def stacked(found: "list[tuple[Part, int]]", name: str) -> Tensor:
    """The tensors `name` of those rows of parts, as one batch."""
    first, row = found[0]
    kind = dtype, shape = first.columns[name].kind(row)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(len(found) * size, np.uint8)
    target = memory.data
    for i, (part, row) in enumerate(found):
        if (other := part.columns[name].kind(row)) != kind:
            raise DataError(
                f"{name} of one batch differ: {shape} {dtype} and {other[1]} {other[0]}, "
                f"the latter in {part.path.parent}"
            )
        part.read_into(name, row, target[i * size : (i + 1) * size])
    if not size:
        return torch.empty((len(found), *shape), dtype=dtype)
    return torch.from_numpy(memory).view(dtype).view(len(found), *shape)


def padded(
    found: "list[tuple[Part, int]]", name: str, most: int | None
) -> tuple[Tensor, list[int]]:
    """The tensors `name` (tokens, ...) of those rows as one batch, filled up with zeros to `most` tokens or to the
    longest of them (at least 1), and the number of tokens of each."""
    kinds = [part.columns[name].kind(row) for part, row in found]
    dtype, (_, *others) = kinds[0]
    lengths = [shape[0] for _, shape in kinds]
    longest = max(1, *lengths) if most is None else most
    for (other, shape), (part, _) in zip(kinds, found, strict=True):
        if other != dtype or [*shape[1:]] != others or shape[0] > longest:
            raise DataError(
                f"{name} of one batch differ: {(longest, *others)} {dtype} at most and {shape} {other}, "
                f"the latter in {part.path.parent}"
            )
    size = math.prod(others) * dtype.itemsize
    memory = np.zeros((len(found), longest * size), np.uint8)
    for line, length, (part, row) in zip(memory, lengths, found, strict=True):
        part.read_into(name, row, line.data[: length * size])
    return torch.from_numpy(memory.reshape(-1)).view(dtype).view(
        len(found), longest, *others
    ), lengths
