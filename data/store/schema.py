"""What a row on disk looks like: its key, and each tensor as raw bytes with dtype and shape.

Raw bytes because Arrow has no bfloat16 and decodes nested lists number by number; any torch dtype
comes back exactly. Latents are raw as the VAE gives them (not normalized); latents and conditioning
are fp32 when we encode them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Features, List, Value
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.bool,
    )
}


MEDIA_TENSORS = ("latents", "deviation", "mask")
"""What a row of media has; the rest in it is conditioning."""


def features(names: list[str]) -> Features:
    """Columns of a store whose rows hold the tensors `names`."""
    columns = {"key": Value("binary")}
    for name in names:
        columns |= {
            f"{name}.data": Value("large_binary"),
            f"{name}.dtype": Value("string"),
            f"{name}.shape": List(Value("int32")),
        }
    return Features(columns)


def to_row(key: bytes, tensors: dict[str, Tensor]) -> dict[str, Any]:
    row: dict[str, Any] = {"key": key}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        row[f"{name}.data"] = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        row[f"{name}.dtype"] = str(tensor.dtype).removeprefix("torch.")
        row[f"{name}.shape"] = list(tensor.shape)
    return row


class Column:
    """One tensor's columns of a part: where in the file each row's bytes are, its dtype and its
    shape."""

    def __init__(self, table: pa.Table, name: str, base: int):
        """`base`: the address at which the file is mapped."""
        places = [byte_places(chunk, base) for chunk in table.column(f"{name}.data").chunks]
        self.first, self.length = (np.concatenate(parts) for parts in zip(*places, strict=True))
        dtypes = table.column(f"{name}.dtype").combine_chunks().dictionary_encode()
        shapes = table.column(f"{name}.shape").combine_chunks()
        sizes = np.diff(shapes.offsets.to_numpy())
        # a line per row: the number of its dtype, its sides, and -1 where others have more sides
        lines = np.full((len(sizes), 1 + sizes.max(initial=0)), -1, np.int32)
        lines[:, 0] = dtypes.indices.to_numpy()
        lines[:, 1:][np.arange(lines.shape[1] - 1) < sizes[:, None]] = shapes.flatten().to_numpy()
        if (lines == lines[:1]).all():  # mostly so, and sorting takes longer than opening the file
            different, self.kinds = lines[:1], np.zeros(len(lines), np.int64)
        else:
            different, self.kinds = np.unique(lines, axis=0, return_inverse=True)
        names = [DTYPES[dtype] for dtype in dtypes.dictionary.to_pylist()]
        self.different = [
            (names[line[0]], tuple(n for n in line[1:] if n >= 0)) for line in different.tolist()
        ]

    def kind(self, row: int) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a row's tensor."""
        return self.different[self.kinds.item(row)]


def byte_places(chunk: pa.Array, base: int) -> tuple[np.ndarray, np.ndarray]:
    """First byte from `base` on, and number of bytes, of each value of a binary column that is
    mapped there."""
    _, offsets, data = chunk.buffers()
    ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
    return ends[:-1] + (data.address - base if data is not None else 0), np.diff(ends)


MASK, LENGTHS = "attention_mask", "lengths"


Ragged = Mapping[str, int | None]
"""As ModelFamily.variable_length."""


NONE: Ragged = {}


def is_ragged(name: str, ragged: Ragged) -> bool:
    """Whether the first dimension of the tensor `name` is tokens, of which rows have different
    numbers."""
    return name in ragged or (bool(ragged) and name == MASK)
