"""Offload of activations: the inputs of checkpointed blocks wait in the memory of the host.

A checkpoint keeps the inputs of a block for the backward pass. With many blocks, long sequences or
large batches they are most of what it keeps. They are copied to the host while the block computes, and
back while the backward pass computes the block after it.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
from weakref import ReferenceType

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

from training.memory.live_bytes import counted_as
from training.memory.phase_memory import HOST
from training.memory.side_stream import Event, SideStream

MIN_BYTES = 2**20
"""Smaller tensors stay on the device."""


@dataclass(eq=False)
class HostedTensor:
    """An activation in the memory of the host."""

    host: Tensor
    event: Event
    """Event after the copy to the host."""
    version: int
    """Version of the tensor, which changes with its values."""
    device_copy: tuple[Tensor, Event] | None = None
    """The copy back, if it has begun."""


class KeptTensor(NamedTuple):
    """The form in which autograd keeps an input of a block."""

    hosted: HostedTensor
    block: int
    """Number of the block in its pass."""


class ActivationCopier:
    """Copies activations to the host and back, one block ahead of the computation."""

    def __init__(self, device: torch.device):
        """`device`: the device that computes."""
        self.side_stream = SideStream(device)
        self.blocks: list[list[ReferenceType[HostedTensor]]] = []
        """Activations of each block, in the order of the pass. References are weak, because a pass
        may end without a backward pass."""
        self.hosted_tensors = WeakIdKeyDictionary()
        """Tensor on the device -> weak reference to its HostedTensor. Blocks may share an input."""
        self.sources: list[tuple[Tensor, Event]] = []
        """Tensors that are copied to the host now, and may not be freed before."""

    @contextmanager
    def offloading(self) -> Iterator[None]:
        """Offload the activations that a block saves for the backward pass."""
        while self.blocks and not any(hosted() for hosted in self.blocks[-1]):
            self.blocks.pop()  # of a pass that ended early
        self.blocks.append([])
        pack = partial(self._pack, len(self.blocks) - 1)
        with saved_tensors_hooks(pack, self._unpack):
            yield

    def _pack(self, block: int, tensor: Tensor) -> Tensor | KeptTensor:
        """Return what is kept. Tensors without gradient, such as masks, are shared by all blocks."""
        is_small = tensor.nbytes < MIN_BYTES
        if is_small or not tensor.requires_grad:
            return tensor
        hosted = self._hosted(tensor)
        self.blocks[block].append(weakref.ref(hosted))
        return KeptTensor(hosted, block)

    @torch.no_grad()
    def _hosted(self, tensor: Tensor) -> HostedTensor:
        """Return a tensor on the host. An earlier block may have had it too."""
        reference = self.hosted_tensors.get(tensor)
        if reference is not None:
            hosted = reference()
            if hosted is not None and hosted.version == tensor._version:
                return hosted
        self._release_sources()
        with counted_as(HOST):
            host, event = self.side_stream.to_host(tensor.detach())
        if event is not None:
            source = tensor.detach()
            self.sources.append((source, event))
        hosted = HostedTensor(host, event, tensor._version)
        self.hosted_tensors[tensor] = weakref.ref(hosted)
        return hosted

    def _release_sources(self) -> None:
        """Free the tensors of earlier blocks, whose memory the computation may use again from now on."""
        for _, event in self.sources:
            self.side_stream.wait(event)
        self.sources.clear()

    @torch.no_grad()
    def _unpack(self, kept: Tensor | KeptTensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._release_sources()
        hosted, block = kept
        tensor, event = self._device_copy(hosted)
        self.side_stream.wait(event)
        hosted.device_copy = None
        self._copy_block_before(block)
        return tensor

    def _copy_block_before(self, block: int) -> None:
        """Start to copy back what the block before another one needs. Forget later blocks."""
        self.blocks = self.blocks[: block + 1]
        if block == 0:
            return
        for reference in self.blocks[block - 1]:
            hosted = reference()
            if hosted is not None:
                self._device_copy(hosted)

    def _device_copy(self, hosted: HostedTensor) -> tuple[Tensor, Event]:
        """Return the copy back of an activation, which begins if it has not."""
        if hosted.device_copy is None:
            self.side_stream.wait(hosted.event)
            hosted.device_copy = self.side_stream.to_device(hosted.host)
        return hosted.device_copy
