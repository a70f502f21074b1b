"""What all ranks know together: small numbers, over a group of their own on the CPU, so that no device is read."""

from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor


class Agreement:
    """Every rank gives a number, and all get to know the largest."""

    def __init__(self, accelerator: Accelerator, timeout: timedelta):
        self.ranks = accelerator.num_processes
        self.group = dist.new_group(backend="gloo", timeout=timeout) if self.ranks > 1 else None
        self.pending: tuple[dist.Work, Tensor] | None = None

    def post(self, number: int) -> None:
        """Sends `number` around, and waits for no one. Collective."""
        assert self.group is not None
        assert self.pending is None, "nothing that was posted is left unread"
        value = torch.tensor(number)
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group, async_op=True)
        assert work is not None
        self.pending = work, value

    def read(self) -> int:
        """The largest of the numbers of the last `post`; 0 if they were read before."""
        if self.pending is None:
            return 0
        (work, value), self.pending = self.pending, None
        work.wait()
        return int(value)

    def now(self, number: int) -> int:
        """The largest of all numbers, also of those that were posted and not read yet. Collective."""
        if self.group is None:
            return number
        value = torch.tensor(max(number, self.read()))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return int(value)

    def all_of(self, values: Tensor) -> Tensor:
        """`values` (n,) of every rank: (ranks, n), on the CPU. Collective."""
        mine = values.cpu()
        if self.group is None:
            return mine.unsqueeze(0)
        everyone = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(everyone, mine, group=self.group)
        return torch.stack(everyone)
