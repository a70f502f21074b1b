"""How much of an adapter stays if another program merges it into the weights of a file.

Such a program adds the update to each weight, and rounds the sum to the file's format. Updates that
are small beside the steps of the format are lost in part.
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
from tools.tables import align_columns, block_of

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
        noise = remainder - update
        self.num_layers += 1
        self.kept += float((update * remainder).sum())
        self.squared_update += float(update.square().sum())
        self.squared_noise += float(noise.square().sum())

    def cells(self, name: str) -> list[str]:
        """Return the texts of one line."""
        if not self.squared_update:
            return [name, str(self.num_layers), "-", "-"]
        share = self.kept / self.squared_update
        noise = math.sqrt(self.squared_noise / self.squared_update)
        return [name, str(self.num_layers), f"{share:.1%}", f"{noise:.1%}"]


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
        lines = [["block", "layers", "stays", "rounding"]]
        for name, row in [*self.rows.items(), ("all", self.total)]:
            lines.append(row.cells(name))
        return "\n".join(align_columns(lines, num_left=2))


def survey(adapter: AdapterFile, model: BaseModel) -> SurvivalTable:
    """Return what stays of each layer's update. Raises AdapterError or ModelError."""
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
    codes = stored.stored[CODES]
    scales = stored.stored[SCALES].float()
    scaled = values / scales
    if not codes.is_floating_point():
        scaled = scaled.round()
    return to_dtype(scaled, codes.dtype) * scales


def to_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values, rounded to a dtype and limited to its range."""
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return values.clamp(limits.min, limits.max).to(dtype).float()
