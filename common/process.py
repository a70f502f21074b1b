"""This process among the processes of a run, and the CPU cores that it may use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


@dataclass(frozen=True)
class ProcessInfo:
    """Index and number of the processes of a run, and the device of this one."""

    index: int
    count: int
    device: torch.device

    @classmethod
    def of(cls, accelerator: Accelerator) -> ProcessInfo:
        return cls(accelerator.process_index, accelerator.num_processes, accelerator.device)

    @property
    def is_main(self) -> bool:
        return self.index == 0


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, container_cores()))


def container_cores() -> int:
    """Return the number of cores that a Linux container may use; a large number without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return int(quota) // int(period)
    except (OSError, ValueError):
        return 1 << 16
