"""The phases of a run, and the memory of each at its peak.

A phase is what a run does with one set of modules in memory.
"""

from dataclasses import dataclass
from typing import Literal

from training.memory.live_bytes import ACTIVATIONS

PhaseName = Literal["encode captions", "encode images", "train", "validate", "preview"]
CAPTIONS: PhaseName = "encode captions"
IMAGES: PhaseName = "encode images"
TRAINING: PhaseName = "train"
VALIDATION: PhaseName = "validate"
PREVIEW: PhaseName = "preview"
BASE = "base model"
ENCODERS = "text encoders"
VAE = "VAE"
ADAPTERS = "adapters"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
HOST = "CPU memory"
"""Weights of offloaded blocks, which are not on the device."""
CATEGORIES = (BASE, ENCODERS, VAE, ADAPTERS, GRADIENTS, OPTIMIZER, ACTIVATIONS)
"""Uses of memory."""


@dataclass(frozen=True)
class PhaseMemory:
    """Memory of one phase at its peak."""

    name: PhaseName
    num_bytes: dict[str, int]
    """Category -> bytes on the device."""
    host_bytes: int = 0
    """Weights of offloaded blocks in the memory of the host."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.num_bytes.values())
