"""Reductions of small numbers over all processes, on a separate gloo group, so that no device is
read."""

from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor


class Consensus:
    """The largest of one number per process, also asynchronously."""

    def __init__(self, accelerator: Accelerator, timeout: timedelta):
        self.num_processes = accelerator.num_processes
        self.group = None
        if self.num_processes > 1:
            self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.pending: tuple[dist.Work, Tensor] | None = None

    def start_max(self, number: int) -> None:
        """Start the reduction of `number`, without waiting. Collective."""
        assert self.group is not None
        assert self.pending is None, "finish_max was not called"
        value = torch.tensor(number)
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group, async_op=True)
        assert work is not None
        self.pending = work, value

    def finish_max(self) -> int:
        """Return the largest number of the last `start_max`; 0 if it was returned before."""
        if self.pending is None:
            return 0
        work, value = self.pending
        self.pending = None
        work.wait()
        return int(value)

    def max_now(self, number: int) -> int:
        """Return the largest of all numbers, including those of a `start_max` that is not finished.
        Collective."""
        if self.group is None:
            return number
        earlier_maximum = self.finish_max()
        value = torch.tensor(max(number, earlier_maximum))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return int(value)

    def gather(self, values: Tensor) -> Tensor:
        """Return the `values` (n,) of every process as (processes, n), on the CPU. Collective."""
        local_values = values.cpu()
        if self.group is None:
            return local_values.unsqueeze(0)
        gathered = local_values.new_empty(self.num_processes, *local_values.shape)
        dist.all_gather(list(gathered), local_values, group=self.group)
        return gathered
