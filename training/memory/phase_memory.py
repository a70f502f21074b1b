"""The phases of a run, and the memory of each at its peak.

A phase is what a run does with one set of modules in memory.
"""

from dataclasses import dataclass
from typing import Literal

PhaseName = Literal["encode captions", "encode images", "train", "validate", "samples"]
CAPTIONS: PhaseName = "encode captions"
IMAGES: PhaseName = "encode images"
TRAINING: PhaseName = "train"
VALIDATION: PhaseName = "validate"
SAMPLES: PhaseName = "samples"
ACTIVATIONS = "activations"
HOST = "CPU memory"
"""Category of what is not on the device."""
BASE = "base model"
ENCODERS = "text encoders"
VAE = "VAE"
ADAPTERS = "adapters"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
CATEGORIES = (BASE, ENCODERS, VAE, ADAPTERS, GRADIENTS, OPTIMIZER, ACTIVATIONS)
"""Uses of memory."""


@dataclass(frozen=True)
class PhaseMemory:
    """Memory of one phase at its peak."""

    name: PhaseName
    num_bytes: dict[str, int]
    """Category -> bytes."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.num_bytes.values()) - self.host_bytes

    @property
    def host_bytes(self) -> int:
        """Offloaded weights and activations in the memory of the host."""
        return self.num_bytes.get(HOST, 0)
