"""WeightFile: a file from which a denoiser's weights are read one at a time."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from models.layer_names.names import OriginalLayer, swap_halves
from models.quantized_weight import Format, QuantizedWeight, StoredTensors

PLAIN_VALUES = "values"
"""Name of the stored tensor of a weight that is not quantized."""
ALL_ROWS = slice(None)
WHOLE_TENSOR = OriginalLayer("")
"""Place of a layer that has a stored tensor for itself."""


class WeightFile(ABC):
    """An open file of weights. Some of them may be quantized."""

    is_quantized: bool
    """True if quantized weights of this file stay quantized: their values take more memory."""

    def __enter__(self) -> "WeightFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    @abstractmethod
    def format(self, key: str) -> Format | None:
        """Return the format of a quantized weight; None if it is plain."""

    @abstractmethod
    def stored(self, key: str, rows: slice) -> StoredTensors:
        """Return rows of a weight as they are stored. All tensors have one row per row.

        A plain weight is stored as PLAIN_VALUES."""

    @abstractmethod
    def empty(self, key: str, num_rows: int) -> StoredTensors:
        """Return `stored` of a quantized weight's rows, without values."""

    def read(self, key: str, dtype: torch.dtype, original: OriginalLayer = WHOLE_TENSOR) -> Tensor:
        """Return a layer's weight or bias, quantized if it is so in the file.

        `original`: where the layer is in the stored tensor."""
        rows = ALL_ROWS
        if original.row_slice is not None:
            first, num_rows = original.row_slice
            rows = slice(first, first + num_rows)
        stored: StoredTensors = {}
        for name, tensor in self.stored(key, rows).items():
            ordered = swap_halves(tensor) if original.swapped_halves else tensor
            stored[name] = in_own_memory(ordered)
        format = self.format(key)
        if format is None:
            return stored[PLAIN_VALUES].to(dtype)
        num_rows = len(ordered)
        shape = torch.Size([num_rows, *self.row_shape(key)])
        return QuantizedWeight(format, stored, shape, dtype)

    @abstractmethod
    def row_shape(self, key: str) -> Iterable[int]:
        """Return the shape of a row of a weight's values."""


def in_own_memory(tensor: Tensor) -> Tensor:
    """Return a tensor that keeps no other numbers in memory, as a part of a larger one would."""
    storage = tensor.untyped_storage()
    is_part = storage.nbytes() > tensor.nbytes
    if is_part:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()
