"""Checks that the processes of a run are in sync. A run out of sync would waste all its time.

Gradients must differ before they are averaged and be equal afterwards, and the adapters must stay
equal.
"""

from collections.abc import Iterable
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from training.distributed.accelerator import DistributedError
from training.distributed.consensus import Consensus

MAX_NAMED = 10
CHECKED_STEPS = 2
"""First steps whose gradients are compared. In the first one, half of the factors still have no
gradient."""


class RankCheck:
    """Compares the gradients of the first steps, and the adapters on demand."""

    def __init__(self, denoiser: nn.Module, trained: dict[str, nn.Parameter], consensus: Consensus):
        self.trained = trained
        self.consensus = consensus
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in trained.items()}
        self.local_checksums: dict[str, Tensor] = {}
        """Parameter name -> checksum of its gradient before the average."""
        self.remaining_steps = 0
        self.pending: tuple[Any, Tensor] | None = None
        self.compared_step = -1
        if isinstance(denoiser, nn.parallel.DistributedDataParallel):
            self.remaining_steps = CHECKED_STEPS
            denoiser.register_comm_hook(None, self._communicate)

    def _communicate(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if self.remaining_steps:
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
                self.local_checksums[self.names[parameter]] = checksums([gradient])[0]
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    def check_gradients(self) -> None:
        """Raise DistributedError if the gradients were not averaged, or were the same before.
        Collective.

        WHEN: after the backward pass of a step. Only the first steps are checked."""
        if not self.remaining_steps:
            return
        gradients = {}
        for name, parameter in self.trained.items():
            if parameter.grad is not None:
                gradients[name] = parameter.grad
        averaged = checksums(list(gradients.values()))
        unknown = torch.tensor(-1, device=averaged.device)
        local = torch.stack([self.local_checksums.get(name, unknown) for name in gradients])
        is_finite = all_finite(list(gradients.values()))
        gathered = self.consensus.gather(torch.cat([is_finite.view(1), averaged, local]))
        if not gathered[:, 0].all():
            return  # another error, which is reported together with the samples
        averaged, local = gathered[:, 1:].chunk(2, dim=1)
        is_different = averaged.ne(averaged[0]).any(0)
        if is_different.any():
            raise DistributedError(
                "the processes' gradients differ after they were averaged: "
                + shortened(names_where(is_different, gradients))
            )
        self.remaining_steps -= 1
        self.local_checksums = {}
        if averaged.any() and local.eq(local[0]).all():
            raise DistributedError(
                "all processes have the same gradients before they are averaged: they train on "
                "the same samples. Report this with the config and the launch command"
            )

    def start_comparison(self, step: int) -> None:
        """Send checksums of the adapters to all processes, once per step and without waiting.
        Collective."""
        if self.consensus.group is None or step == self.compared_step:
            return
        sums = checksums(list(self.trained.values()))
        extremes = torch.cat([sums, -sums])
        work = dist.all_reduce(extremes, dist.ReduceOp.MAX, async_op=True)
        self.pending = work, extremes
        self.compared_step = step

    def finish_comparison(self) -> None:
        """Raise DistributedError if the adapters were not the same in all processes. Reads the
        device."""
        if self.pending is None:
            return
        work, extremes = self.pending
        self.pending = None
        work.wait()
        largest, negated_smallest = extremes.cpu().chunk(2)
        is_different = largest + negated_smallest != 0
        if is_different.any():
            raise DistributedError(
                f"at step {self.compared_step} the adapters are not the same in all processes: "
                + shortened(names_where(is_different, self.trained))
            )


def names_where(mask: Tensor, names: Iterable[str]) -> list[str]:
    """Return the names at which `mask` (n,) is true."""
    return list(compress(names, mask.tolist()))


def all_finite(tensors: list[Tensor]) -> Tensor:
    """Return 1 if all values of all tensors are finite, else 0, without reading the device."""
    flags = torch.stack([tensor.isfinite().all() for tensor in tensors])
    return flags.all().long()


def shortened(names: list[str]) -> str:
    """Join names; those after the first MAX_NAMED are counted."""
    text = ", ".join(names[:MAX_NAMED])
    num_hidden = len(names) - MAX_NAMED
    if num_hidden > 0:
        text += f" and {num_hidden} more"
    return text


def checksums(tensors: list[Tensor]) -> Tensor:
    """Return (n,) int64 checksums on the device of the tensors, without reading it. Equal bits have
    equal checksums."""
    sums = []
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(torch.int32)
        sums.append(bits.sum(dtype=torch.int64))
    return torch.stack(sums)
