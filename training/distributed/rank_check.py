"""That the ranks of a run are one run: the same adapters everywhere, gradients that differ before they are averaged and
are equal afterwards. What fails here without a check trains on, slowly and wrongly."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from training.distributed.accelerator import DistributedError
from training.distributed.consensus import Agreement

MOST_NAMED = 10
FIRST_STEPS = 2  # in the first one, half of the factors have no gradient yet: the others are zero


class SyncCheck:
    """Looks at the first steps' gradients, and every so many steps at the adapters."""

    def __init__(self, denoiser: nn.Module, trained: dict[str, nn.Parameter], agreement: Agreement):
        self.trained, self.agreement = trained, agreement
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in trained.items()}
        self.before: dict[str, Tensor] = {}
        self.left = 0  # of the first steps
        self.pending: tuple[Any, Tensor] | None = None
        self.pending_step = 0
        if isinstance(denoiser, nn.parallel.DistributedDataParallel):
            self.left = FIRST_STEPS
            denoiser.register_comm_hook(None, self._hook)

    def _hook(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if self.left:
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
                self.before[self.names[parameter]] = checksums([gradient])[0]
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    def gradients(self) -> None:
        """After a backward pass: raises DistributedError if the ranks' gradients were not averaged, or were the same
        before. Looks at the first ones only. Collective."""
        if not self.left:
            return
        names = [name for name, parameter in self.trained.items() if parameter.grad is not None]
        after = checksums([self.trained[name].grad for name in names])  # type: ignore[misc]
        missing = torch.tensor(-1, device=after.device)
        before = torch.stack([self.before.get(name, missing) for name in names])
        finite = torch.stack([self.trained[name].grad.isfinite().all() for name in names]).all().long()  # type: ignore[union-attr]
        everyone = self.agreement.all_of(torch.cat([finite.view(1), after, before]))
        if not everyone[:, 0].all():
            return  # another fault, which is reported with its samples
        after, before = everyone[:, 1:].chunk(2, dim=1)
        if bad := [name for i, name in enumerate(names) if not after[:, i].eq(after[0, i]).all()]:
            raise DistributedError(f"the ranks' gradients differ after they should have been averaged: {named(bad)}")
        self.left, self.before = self.left - 1, {}
        if after.any() and before.eq(before[0]).all():
            raise DistributedError(
                "all ranks have the same gradients before they are averaged: they train on the same samples. "
                "Report this with the config and the launch command"
            )

    def start(self, step: int) -> None:
        """Sends checksums of the adapters around, without waiting."""
        if self.agreement.group is None:
            return
        sums = checksums(list(self.trained.values()))
        both = torch.cat([sums, -sums])
        self.pending = dist.all_reduce(both, dist.ReduceOp.MAX, async_op=True), both
        self.pending_step = step

    def finish(self) -> None:
        """Raises DistributedError if the adapters were not the same on all ranks. Reads the device."""
        if self.pending is None:
            return
        (work, both), self.pending = self.pending, None
        work.wait()
        largest, smallest = both.cpu().chunk(2)  # the largest of the negated is the smallest negated
        differs = (largest + smallest) != 0
        if bad := [name for name, different in zip(self.trained, differs.tolist(), strict=True) if different]:
            raise DistributedError(
                f"at step {self.pending_step} the adapters are not the same on all ranks: {named(bad)}"
            )


def named(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def checksums(tensors: list[Tensor]) -> Tensor:
    """(n,) int64, equal for equal bits; on their device, where nothing is read."""
    return torch.stack([tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64) for tensor in tensors])
