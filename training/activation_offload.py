"""Offload of activations: the inputs of checkpointed blocks wait in the memory of the host.

A checkpoint keeps the inputs of a block for the backward pass. With many blocks, long sequences or
large batches they are most of what it keeps. They are copied to the host while the block computes, and
back while the backward pass computes the block after it.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import ReferenceType

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from training.memory.live_bytes import HOST, counted_as
from training.memory.side_stream import Event, SideStream

MIN_BYTES = 2**20
"""Smaller tensors stay on the device."""


@dataclass(eq=False)
class HostedTensor:
    """An activation in the memory of the host."""

    host: Tensor
    event: Event
    """Event after the copy to the host."""
    device_copy: tuple[Tensor, Event] | None = None
    """The copy back, if it has begun."""


class ActivationCopier:
    """Copies activations to the host and back, one block ahead of the computation."""

    def __init__(self, device: torch.device):
        """`device`: the device that computes."""
        self.side_stream = SideStream(device)
        self.waiting: list[ReferenceType[HostedTensor]] = []
        """Activations in the order in which they were made. The backward pass needs the last ones
        first. References are weak, because a pass may end without a backward pass."""

    @contextmanager
    def offloading(self) -> Iterator[None]:
        """Offload the activations that a block of code saves for the backward pass."""
        with saved_tensors_hooks(self._pack, self._unpack):
            yield

    @torch.no_grad()
    def _pack(self, tensor: Tensor) -> Tensor | HostedTensor:
        """Return what is kept. Tensors without gradient, such as masks, are shared by all blocks."""
        if not tensor.requires_grad or tensor.nbytes < MIN_BYTES:
            return tensor
        with counted_as(HOST):
            host, event = self.side_stream.to_host(tensor.detach())
        hosted = HostedTensor(host, event)
        while self.waiting and self.waiting[-1]() is None:  # of a pass that ended early
            self.waiting.pop()
        self.waiting.append(weakref.ref(hosted))
        return hosted

    @torch.no_grad()
    def _unpack(self, kept: Tensor | HostedTensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._begin(kept)
        assert kept.device_copy is not None
        tensor, event = kept.device_copy
        self.side_stream.wait(event)
        kept.device_copy = None
        next_kept = self._before(kept)
        if next_kept is not None:
            self._begin(next_kept)
        return tensor

    def _before(self, kept: HostedTensor) -> HostedTensor | None:
        """Return the activation that was made before another one, if it waits. Forget later ones."""
        while self.waiting:
            if self.waiting.pop()() is kept:
                break
        return self.waiting[-1]() if self.waiting else None

    def _begin(self, kept: HostedTensor) -> None:
        """Start to copy an activation back, if that has not begun."""
        if kept.device_copy is None:
            self.side_stream.wait(kept.event)
            kept.device_copy = self.side_stream.to_device(kept.host)
