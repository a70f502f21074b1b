"""The `memory` section of the config. This module imports no torch, because `--help` reads it."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from common.config_fields import CHANGEABLE, STRICT

GIB = 2**30
"""Bytes. The GB of a card's name are GiB."""
ResultChange = Literal["fp8", "int8", "nf4", "batch_size", "vae_dtype", "vae_tiling"]
"""A change that saves memory and changes the result."""


BUDGET = re.compile(r"none|check|auto|(\d+(?:\.\d+)?) ?(?i:G(?:i?B)?)")


def budget_text(value: Any) -> str:
    """Return a budget as text. Raises ValueError for another value."""
    text = str(value)
    match = BUDGET.fullmatch(text)
    size = match[1] if match is not None else None
    is_zero = size is not None and float(size) == 0
    if match is None or is_zero:
        raise ValueError("expected none, check, auto, or a size such as 12GB")
    return text


def number_of_blocks(value: Any) -> str:
    """Return a number of blocks as text. Raises ValueError for another value."""
    text = str(value)
    match = re.fullmatch(r"all|\d+|(\d+)%", text)
    percent = match[1] if match is not None else None
    is_above_all = percent is not None and int(percent) > 100
    if match is None or is_above_all:
        raise ValueError("expected a number of blocks, a share such as 50%, or all")
    return text


@dataclass(frozen=True)
class MemoryConfig:
    """Use of the memory of a GPU and of its host."""

    __pydantic_config__ = STRICT

    offload_blocks: Annotated[str, BeforeValidator(number_of_blocks), CHANGEABLE] = "0"
    """Blocks whose frozen weights stay in CPU memory and are copied to the GPU when they compute: a
    number, a share such as 50%, or all. The result is the same bit for bit. It needs
    gradient_checkpointing, and concerns only blocks that are recomputed."""
    offload_activations: Annotated[bool, CHANGEABLE] = False
    """Keep the inputs of recomputed blocks in CPU memory until the backward pass. It saves memory for
    videos, large images and large batches, and costs time. The result is the same bit for bit."""
    budget: Annotated[str, BeforeValidator(budget_text), CHANGEABLE] = "check"
    """Memory that a run may take. check: on a GPU, plan the memory first, and stop if training does
    not fit. auto: on a GPU, change options so that the run fits, but none that changes the result. A
    size such as 12GB (in GiB): like auto, for this amount, also on a CPU. none: no plan. A plan takes
    seconds for a small model, and up to minutes for a large one."""
    allow: Annotated[tuple[ResultChange, ...], CHANGEABLE] = ()
    """Options that change the result and that a budget of auto or a size may change: formats of
    quantization, the batch size, and the dtype and tiling of the VAE."""

    @property
    def budget_bytes(self) -> int | None:
        """The budget in bytes, if it is a size."""
        match = BUDGET.fullmatch(self.budget)
        if match is None or match[1] is None:
            return None
        return int(float(match[1]) * GIB)

    @property
    def chooses_options(self) -> bool:
        """True if the run changes options so that it fits."""
        return self.budget not in ("none", "check")

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
