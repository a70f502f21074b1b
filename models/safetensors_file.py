"""Reading of a denoiser's .safetensors file, whose weights may be codes with scales, as ComfyUI
writes them.

  X.weight          codes in float8 or int8
  X.scale_weight    a number, or a number per row, by which codes are multiplied
  X.weight_scale    the same in newer files

Scales of inputs, which let a GPU multiply codes, are not needed.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from common.errors import ModelError
from models.checkpoint_files import SCALE_SUFFIXES, any_scales
from models.quantization import CODES, FORMATS, SCALES
from models.quantized_weight import Format, StoredTensors
from models.weight_file import PLAIN_VALUES, WeightFile

FORMATS_OF_CODES = {"F8_E4M3": FORMATS["fp8"], "F8_E5M2": FORMATS["fp8"], "I8": FORMATS["int8"]}
"""dtype of codes, as safetensors names it -> their format."""


class SafetensorsFile(WeightFile):
    """An open .safetensors file."""

    def __init__(self, path: Path):
        self.path = path
        self.file = safe_open(path, framework="pt")
        self.keys = set(self.file.keys())
        self.is_quantized = any_scales(self.keys)

    def close(self) -> None:
        self.file.__exit__(None, None, None)

    def format(self, key: str) -> Format | None:
        stored = self.file.get_slice(key)
        is_matrix = len(stored.get_shape()) == 2
        if not is_matrix:
            return None
        dtype = stored.get_dtype()
        return FORMATS_OF_CODES.get(dtype)

    def stored(self, key: str, rows: slice) -> StoredTensors:
        stored = self.file.get_slice(key)
        is_number = not stored.get_shape()
        values = self.file.get_tensor(key) if is_number else stored[rows]
        if self.format(key) is None:
            return {PLAIN_VALUES: self._scaled(values, key, rows)}
        scales = self._row_scales(key)
        return {
            CODES: values,
            SCALES: scales[rows],
        }

    def empty(self, key: str, num_rows: int) -> StoredTensors:
        (num_columns,) = self.row_shape(key)
        codes = torch.empty(num_rows, num_columns)
        scales = torch.empty(num_rows, 1)
        return {
            CODES: codes.to(torch.uint8),  # all codes of these files are bytes
            SCALES: scales,
        }

    def _scaled(self, values: Tensor, key: str, rows: slice) -> Tensor:
        """Return values times their scale, if they are codes of another shape than a matrix."""
        if self._scale_key(key) is None:
            return values
        scales = self._row_scales(key)[rows]
        shape = [len(values), *[1] * (values.ndim - 1)]
        return values.float() * scales.reshape(shape)

    def _scale_key(self, key: str) -> str | None:
        """Return the key of the scales of a weight; None if it has none."""
        layer = key.removesuffix(".weight")
        for suffix in SCALE_SUFFIXES:
            scale_key = layer + suffix
            if scale_key in self.keys and key.endswith(".weight"):
                return scale_key
        return None

    def _row_scales(self, key: str) -> Tensor:
        """Return (out, 1) in fp32. Codes without a scale are values."""
        stored = self.file.get_slice(key)
        num_rows = stored.get_shape()[0]
        scale_key = self._scale_key(key)
        scales = torch.ones(1)
        if scale_key is not None:
            scales = self.file.get_tensor(scale_key)
        num_scales = scales.numel()
        if num_scales not in (1, num_rows):
            raise ModelError(
                f"{self.path}: {key} has {num_scales} scales; expected 1 or {num_rows}"
            )
        rows = scales.float().reshape(-1, 1)
        return rows.expand(num_rows, 1)

    def row_shape(self, key: str) -> Iterable[int]:
        return self.file.get_slice(key).get_shape()[1:]
