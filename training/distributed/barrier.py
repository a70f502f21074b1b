"""A barrier without a time limit, for work whose duration no process can know: a slow disk, a slow
image, a large export.

A collective has a time limit, after which it ends the run. This barrier looks into the store of the
process group instead. A process that fails meanwhile ends the others through FailureWatch.
"""

import time

import torch.distributed as dist
from accelerate import Accelerator

from training.distributed.run_store import shared_store

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.25
"""Seconds between two looks into the store. They grow while a process waits."""


class StoreBarrier:
    """Waits until all processes of a run have arrived."""

    def __init__(self, accelerator: Accelerator):
        self.num_processes = accelerator.num_processes
        self.num_waits = 0
        self.store: dist.Store | None = None
        if self.num_processes > 1:
            self.store, self.key_prefix = shared_store(accelerator, "barrier")

    def wait(self) -> None:
        """Return when all processes have called this method equally often."""
        self.num_waits += 1
        if self.store is None:
            return
        key = f"{self.key_prefix}/{self.num_waits}"
        num_arrived = self.store.add(key, 1)
        pause = FIRST_PAUSE
        while num_arrived < self.num_processes:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            num_arrived = self.store.add(key, 0)
