"""A barrier without a time limit, for work whose duration no process can know: a slow disk, a slow
image, a large export.

A collective has a time limit, after which it ends the run. This barrier looks into the store of the
process group instead. A process that fails meanwhile ends the others through FailureWatch. One that
was killed, or whose node is lost, is noticed because it no longer counts up its heartbeat.
"""

import time

import torch.distributed as dist
from accelerate import Accelerator

from training.distributed.accelerator import DistributedError
from training.distributed.failures import BEAT_EVERY
from training.distributed.run_store import shared_store

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.25
"""Seconds between two looks into the store. They grow while a process waits."""


class StoreBarrier:
    """Waits until all processes of a run have arrived."""

    def __init__(self, accelerator: Accelerator, heartbeat_keys: list[str], lost_after: float):
        """`heartbeat_keys`: of all processes, see FailureWatch. `lost_after`: seconds without a
        heartbeat after which a process is taken as lost."""
        self.num_processes = accelerator.num_processes
        # one process asks for all: its error ends the others
        self.heartbeat_keys = heartbeat_keys if accelerator.is_main_process else []
        self.lost_after = lost_after
        self.num_waits = 0
        self.store: dist.Store | None = None
        if self.num_processes > 1:
            self.store, self.key_prefix = shared_store(accelerator, "barrier")

    def wait(self) -> None:
        """Return when all processes have called this method equally often.

        Raises DistributedError if one of them is lost."""
        self.num_waits += 1
        if self.store is None:
            return
        key = f"{self.key_prefix}/{self.num_waits}"
        num_arrived = self.store.add(key, 1)
        heartbeats = Heartbeats(self.store, self.heartbeat_keys, self.lost_after)
        pause = FIRST_PAUSE
        while num_arrived < self.num_processes:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            heartbeats.check()
            num_arrived = self.store.add(key, 0)


class Heartbeats:
    """The heartbeats of all processes, as one process sees them."""

    def __init__(self, store: dist.Store, keys: list[str], lost_after: float):
        self.store = store
        self.keys = keys
        self.lost_after = lost_after
        self.counts = [-1] * len(keys)
        self.moved_at = [time.monotonic()] * len(keys)
        self.next_check = 0.0

    def check(self) -> None:
        """Raise DistributedError if a heartbeat has not moved for too long."""
        now = time.monotonic()
        if now < self.next_check:
            return
        self.next_check = now + BEAT_EVERY
        for rank, key in enumerate(self.keys):
            count = self.store.add(key, 0)
            if count != self.counts[rank]:
                self.counts[rank] = count
                self.moved_at[rank] = now
            elif now - self.moved_at[rank] > self.lost_after:
                raise DistributedError(
                    f"rank {rank} has not answered for {self.lost_after:.0f} seconds "
                    "(distributed.timeout_minutes): its process or its node is lost"
                )
