"""The `memory` section of the config. This module imports no torch, because `--help` reads it."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from common.config_fields import CHANGEABLE, STRICT

ResultChange = Literal["fp8", "int8", "nf4", "batch_size", "vae_dtype", "vae_tiling"]
"""A change that saves memory and changes the result."""


@dataclass(frozen=True)
class MemoryConfig:
    """Use of the memory of a GPU and of its host."""

    __pydantic_config__ = STRICT

    offload_blocks: Annotated[
        str, Field(pattern=r"^(all|\d+%?)$"), BeforeValidator(str), CHANGEABLE
    ] = "0"
    """Blocks whose frozen weights stay in CPU memory and are copied to the GPU when they compute: a
    number, a share such as 50%, or all. The result is the same bit for bit. It needs
    gradient_checkpointing, and concerns only blocks that are recomputed."""
    offload_activations: Annotated[bool, CHANGEABLE] = False
    """Keep the inputs of recomputed blocks in CPU memory until the backward pass. It saves memory for
    videos, large images and large batches, and costs time. The result is the same bit for bit."""
    budget: Annotated[
        str, Field(pattern=r"^(none|check|auto|[\d.]+ ?[Gg][Ii]?[Bb]?)$"), CHANGEABLE
    ] = "check"
    """Memory that a run may take. check: on a GPU, plan the memory first, and stop if the run does
    not fit. auto: also change options so that it fits, but none that changes the result. 12GB: as
    auto, for so much memory. none: no plan."""
    allow: Annotated[tuple[ResultChange, ...], CHANGEABLE] = ()
    """Options that change the result and that budget may change: formats of quantization, the batch
    size, and the dtype and tiling of the VAE."""

    @property
    def budget_bytes(self) -> int | None:
        """The budget in bytes, if it is a number. The GB of a card's name are GiB."""
        match = re.match(r"[\d.]+", self.budget)
        return int(float(match[0]) * 2**30) if match else None

    @property
    def is_offloading(self) -> bool:
        return self.offload_activations or self.num_offloaded(1) > 0

    def num_offloaded(self, num_blocks: int) -> int:
        """Return the number of offloaded blocks, if so many can be."""
        value = self.offload_blocks
        if value == "all":
            return num_blocks
        if value.endswith("%"):
            percent = min(int(value[:-1]), 100)
            return math.ceil(num_blocks * percent / 100)
        return min(int(value), num_blocks)

    def errors(self, gradient_checkpointing: bool) -> list[str]:
        """Return options that do not fit together."""
        if gradient_checkpointing:
            return []
        errors = []
        if self.num_offloaded(1):
            errors.append(
                f"--memory.offload_blocks {self.offload_blocks}: needs --gradient_checkpointing, "
                "because a block that is not recomputed keeps its weights for the backward pass"
            )
        if self.offload_activations:
            errors.append(
                "--memory.offload_activations: needs --gradient_checkpointing, because it concerns "
                "the inputs of recomputed blocks"
            )
        return errors
