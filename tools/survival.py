"""The part of an adapter that stays if another program merges it into the weights of a file.

Such a program adds the update to each weight, and rounds the sum to the file's format. Updates that
are smaller than the steps of the format are lost in part.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.errors import AdapterError, ModelError
from models.quantization import CODES, SCALES
from models.quantized_weight import QuantizedWeight
from tools.adapter_file import AdapterFile, delta_of
from tools.base_model import BaseModel
from tools.tables import NO_VALUE, align_columns, block_of

GGUF_DTYPE = torch.bfloat16
"""dtype of weights with updates in programs that read GGUF files: they merge into the values."""


@dataclass
class Survival:
    """Sums over the layers of one block."""

    num_layers: int = 0
    kept: float = 0.0
    """Products of the update and of what is left of it."""
    squared_update: float = 0.0
    squared_noise: float = 0.0

    def add(self, update: Tensor, remainder: Tensor) -> None:
        """Add a layer. `remainder`: what merging changes in the weight."""
        self.num_layers += 1
        self.kept += inner_product(update, remainder)
        self.squared_update += inner_product(update, update)
        noise = remainder - update
        self.squared_noise += inner_product(noise, noise)

    def cells(self, name: str) -> list[str]:
        """Return the texts of one line."""
        share = noise = NO_VALUE
        if self.squared_update:
            ratio = self.squared_noise / self.squared_update
            share = f"{self.kept / self.squared_update:.1%}"
            noise = f"{math.sqrt(ratio):.1%}"
        return [
            name,
            str(self.num_layers),
            share,
            noise,
        ]


def inner_product(first: Tensor, second: Tensor) -> float:
    """Return the sum of all products."""
    return float((first * second).sum())


@dataclass
class SurvivalTable:
    """A line per block, and one for all."""

    rows: dict[str, Survival] = field(default_factory=dict)
    total: Survival = field(default_factory=Survival)

    def add(self, layer: str, update: Tensor, remainder: Tensor) -> None:
        """Add a layer."""
        block = block_of(layer)
        row = self.rows.setdefault(block, Survival())
        for sums in (row, self.total):
            sums.add(update, remainder)

    def __str__(self) -> str:
        rows = dict(self.rows)
        rows["all"] = self.total
        table = [["block", "layers", "stays", "rounding"]]
        for name, row in rows.items():
            cells = row.cells(name)
            table.append(cells)
        lines = align_columns(table, num_left=2)
        return "\n".join(lines)


def survey(adapter: AdapterFile, model: BaseModel) -> SurvivalTable:
    """Return what stays of each layer's update.

    Raises AdapterError for damaged layers, and ModelError for layers that the model lacks."""
    table = SurvivalTable()
    for layer in adapter.layers:
        if layer not in model.layers:
            raise ModelError(f"--against: has no layer {layer}. Use a model of the same family")
        stored = model.stored_weight(layer)
        weight = model.weight(layer)
        data = adapter.read(layer)
        try:
            update = delta_of(data.tensors, weight).reshape(weight.shape)
        except AdapterError as error:
            raise AdapterError(f"{layer}: {error}") from error
        remainder = rounded(weight + update, stored) - weight
        table.add(layer, update, remainder)
    return table


def rounded(values: Tensor, stored: Tensor) -> Tensor:
    """Return values (fp32), rounded to the nearest ones in the format of a stored weight."""
    if not isinstance(stored, QuantizedWeight):
        return to_dtype(values, stored.dtype)
    if CODES not in stored.stored:
        return to_dtype(values, GGUF_DTYPE)
    dtype = stored.stored[CODES].dtype
    scales = stored.stored[SCALES].float()
    scaled = values / scales
    if not dtype.is_floating_point:
        scaled = scaled.round()
    codes = to_dtype(scaled, dtype)
    return codes * scales


def to_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values, rounded to a dtype and limited to its range."""
    largest: float
    if dtype.is_floating_point:
        largest = torch.finfo(dtype).max
    else:
        largest = torch.iinfo(dtype).max
    limited = values.clamp(-largest, largest)
    return limited.to(dtype).float()
