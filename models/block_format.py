"""The format in which a denoiser's blocks are loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.config import Quantization
from models.quantization import FORMATS, quantize
from models.quantized_weight import QuantizedWeight, plain_values


@dataclass(frozen=True)
class BlockFormat:
    """The format of the weights in a denoiser's blocks."""

    quantization: Quantization = "none"
    device: torch.device | None = None
    """Device that computes the codes."""
    keeps_stored_format: bool = False
    """True if weights that a file stores quantized stay so, if no other format is chosen."""

    @property
    def is_plain(self) -> bool:
        return self.quantization == "none"

    def quantized(self, weight: Tensor) -> Tensor:
        """Return a weight in the format."""
        return quantize(weight, FORMATS[self.quantization], self.device)

    def formatted(self, weight: Tensor, is_file_quantized: bool) -> Tensor:
        """Return a weight of a file in the format.

        `is_file_quantized`: the file is made for weights that stay in its format."""
        if self.is_plain:
            is_kept = self.keeps_stored_format and is_file_quantized
            return weight if is_kept else plain_values(weight)
        if isinstance(weight, QuantizedWeight) and weight.format.name == self.quantization:
            return weight
        return self.quantized(plain_values(weight))

    def diffusers_options(
        self, blocks_of: Callable[[nn.Module], dict[str, nn.Module]]
    ) -> dict[str, Any]:
        """Return arguments of diffusers' from_pretrained. `blocks_of`: returns a model's blocks."""
        if self.is_plain:
            return {}
        from models.quantized_loading import BlockQuantization

        return {"quantization_config": BlockQuantization(self.quantized, blocks_of)}


PLAIN = BlockFormat()
