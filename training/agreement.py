"""What all ranks know together: small numbers, over a group of their own on the CPU, so that no device is read."""

from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor


class Agreement:
    """Every rank gives a number, and all get to know the largest. All methods are collective."""

    def __init__(self, accelerator: Accelerator, timeout: timedelta):
        self.ranks = accelerator.num_processes
        self.group = dist.new_group(backend="gloo", timeout=timeout) if self.ranks > 1 else None
        self.alone = 0
        self.pending: tuple[dist.Work, Tensor] | None = None

    def later(self, number: int) -> int:
        """The largest of the numbers given at the call before; no rank waits for another."""
        known, self.alone = self._known(), number
        if self.group is not None:
            value = torch.tensor(number)
            work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group, async_op=True)
            assert work is not None
            self.pending = work, value
        return known

    def now(self, number: int) -> int:
        """The largest of all numbers, also of those of the last call of `later`."""
        known = max(number, self._known())
        if self.group is None:
            return known
        value = torch.tensor(known)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return int(value)

    def all_of(self, values: Tensor) -> Tensor:
        """`values` (n,) of every rank: (ranks, n), on the CPU."""
        mine = values.cpu()
        if self.group is None:
            return mine.unsqueeze(0)
        everyone = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(everyone, mine, group=self.group)
        return torch.stack(everyone)

    def _known(self) -> int:
        known, self.alone = self.alone, 0
        if self.pending is None:
            return known
        (work, value), self.pending = self.pending, None
        work.wait()
        return int(value)
