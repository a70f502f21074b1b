"""This process among the processes of a run."""

from __future__ import annotations

from dataclasses import dataclass
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
