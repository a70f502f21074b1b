"""Offload: frozen weights of blocks that stay in the memory of the host, and are copied to the device
when their block computes.

An offloaded block gets a subclass of its class that differs in `forward` and in how it is moved
(training/block_classes.py). It is inside of the block's checkpoint: the backward pass computes the
block again, which copies the weights again, and autograd frees them with the block's activations.
While a block computes, the next one is copied on another stream. So two blocks are on the device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_algos.frozen_weight import mark_temporary
from models.quantized_weight import QuantizedWeight, stored_parts
from training.block_classes import with_forward
from training.gradient_checkpointing import hidden_from_policy
from training.memory.live_bytes import counted_as
from training.memory.phase_memory import BASE
from training.memory.side_stream import Event, SideStream, pin

ALIGNMENT = 256
"""Each tensor in a buffer begins at a multiple of so many bytes, as CUDA's kernels expect."""


@dataclass(frozen=True)
class BufferedTensor:
    """The place and the form of a tensor in a buffer of bytes."""

    offset: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + self.size.numel() * self.dtype.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        """Return the tensor in a buffer."""
        values = buffer[self.offset : self.end].view(self.dtype)
        return values.as_strided(self.size, self.stride)


def buffered_tensors(tensors: list[Tensor]) -> list[BufferedTensor]:
    """Return places for tensors in a buffer, one after the other."""
    layout = []
    offset = 0
    for tensor in tensors:
        stride = dense(tensor).stride()
        entry = BufferedTensor(offset, tensor.dtype, tensor.size(), stride)
        layout.append(entry)
        offset = -(-entry.end // ALIGNMENT) * ALIGNMENT
    return layout


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory has no gaps; convolutions keep channels-last weights."""
    is_channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor if is_channels_last else tensor.contiguous()


class HostWeights:
    """The weights of a block in one buffer, in the memory of the host."""

    def __init__(self, block: nn.Module, is_pinned: bool):
        """Move the block's weights into a new buffer. Layers that share a weight still do."""
        self.slots: list[tuple[nn.Module, str]] = []
        """Module and name of each weight."""
        self.indices: list[int] = []
        """Index of the weight in each slot."""
        self.weights: list[Tensor] = []
        index_of_weight: dict[nn.Parameter, int] = {}
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter not in index_of_weight:
                    index_of_weight[parameter] = len(self.weights)
                    self.weights.append(parameter.detach())
                self.slots.append((module, name))
                self.indices.append(index_of_weight[parameter])
        tensors = []
        for weight in self.weights:
            tensors += stored_parts(weight)
        self.layout = buffered_tensors(tensors)
        self.buffer = torch.empty(self.layout[-1].end, dtype=torch.uint8)
        self.lacks_pinned_memory = is_pinned and not pin(self.buffer)
        """True if the system gave no pinned memory. Copies are slow then, and the computation waits
        for them."""
        for entry, tensor in zip(self.layout, tensors, strict=True):
            entry.view(self.buffer).copy_(tensor)
        self.weights = self.weights_in(self.buffer)  # frees the first ones
        self.parameters = self.parameters_of(self.weights)
        self.install(self.parameters)

    @torch.no_grad()
    def take_back(self) -> None:
        """Put weights into the buffer that were replaced while adapters were attached."""
        for index, parameter in zip(self.indices, self.parameters, strict=True):
            weight = self.weights[index]
            if isinstance(weight, QuantizedWeight) or parameter.data_ptr() == weight.data_ptr():
                continue
            weight.copy_(parameter)
            parameter.data = weight

    def weights_in(self, buffer: Tensor) -> list[Tensor]:
        """Return the block's weights in a copy of its buffer."""
        tensors = iter([entry.view(buffer) for entry in self.layout])
        weights: list[Tensor] = []
        for weight in self.weights:
            if isinstance(weight, QuantizedWeight):
                stored = {name: next(tensors) for name in weight.stored}
                weights.append(weight.with_tensors(stored))
            else:
                weights.append(next(tensors))
        return weights

    def parameters_of(self, weights: list[Tensor]) -> list[nn.Parameter]:
        """Return a parameter for each slot."""
        parameters = [nn.Parameter(weight, requires_grad=False) for weight in weights]
        return [parameters[index] for index in self.indices]

    def install(self, parameters: Sequence[nn.Parameter | None]) -> None:
        """Let the block's layers have these parameters."""
        for (module, name), parameter in zip(self.slots, parameters, strict=True):
            module._parameters[name] = parameter

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Take the weights out of the layers in a block of code."""
        self.install([None] * len(self.slots))
        try:
            yield
        finally:
            self.install(self.parameters)


@dataclass(frozen=True)
class DeviceCopy:
    """The weights of a block on the device."""

    source: HostWeights
    parameters: list[nn.Parameter]
    event: Event
    """Event after the copy."""


class BlockCopier:
    """Copies weights of blocks to a device, one block ahead of the computation.

    The order of the blocks is learned in the first pass. A wrong guess only costs time."""

    def __init__(self, device: torch.device):
        self.side_stream = SideStream(device)
        self.order: dict[HostWeights, int] = {}
        self.next_copy: DeviceCopy | None = None

    @contextmanager
    def installed(self, weights: HostWeights) -> Iterator[None]:
        """Let a block compute with weights on the device, and copy those of the next block."""
        try:
            with hidden_from_policy():
                copy = self._take(weights)
                weights.install(copy.parameters)
                self._prepare_next(copy)
            del copy  # autograd keeps what it needs
            yield
        finally:
            weights.install(weights.parameters)

    def _take(self, weights: HostWeights) -> DeviceCopy:
        """Return a block's weights on the device, which has them from now on."""
        copy = self.next_copy
        self.next_copy = None
        if copy is not None:
            self.side_stream.wait(copy.event)  # also if it is freed without being used
        if copy is None or copy.source is not weights:
            copy = self._copy(weights)
            self.side_stream.wait(copy.event)
        return copy

    def _prepare_next(self, copy: DeviceCopy) -> None:
        next_weights = self._next_of(copy.source)
        if next_weights is copy.source:
            self.next_copy = copy
        elif next_weights is not None:
            self.next_copy = self._copy(next_weights)

    def _next_of(self, weights: HostWeights) -> HostWeights | None:
        """Return the weights that are needed after a block's; None in the first pass.

        A backward pass goes from the last block to the first, and begins with the one that was last."""
        if weights not in self.order:
            self.order[weights] = len(self.order)
            return None
        is_backward = torch._C._current_graph_task_id() != -1
        neighbor = self.order[weights] + (-1 if is_backward else 1)
        all_weights = list(self.order)
        if 0 <= neighbor < len(all_weights):
            return all_weights[neighbor]
        return weights if torch.is_grad_enabled() else all_weights[0]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _copy(self, weights: HostWeights) -> DeviceCopy:
        """Start to copy a block's weights to the device."""
        with counted_as(BASE):
            buffer, event = self.side_stream.to_device(weights.buffer)
        parameters = weights.parameters_of(weights.weights_in(buffer))
        for parameter in parameters:
            mark_temporary(parameter)
        return DeviceCopy(weights, parameters, event)


class Offloaded(nn.Module):
    """Marks the classes that `offloaded` makes."""

    original: ClassVar[type[nn.Module]]
    host_weights: HostWeights
    copier: BlockCopier

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Apply a function, such as one that moves tensors to a device, except to offloaded weights."""
        with self.host_weights.removed():
            return super()._apply(*args, **kwargs)


@cache
def offloaded(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of `cls` with the same name, whose weights are copied when it computes."""
    original = cls.forward

    @wraps(original)
    def forward(self, *args, **kwargs):
        with self.copier.installed(self.host_weights):
            return original(self, *args, **kwargs)

    return with_forward(cls, Offloaded, forward)


def apply(blocks: list[nn.Module], device: torch.device) -> None:
    """Offload blocks with weights. `device`: the device that computes.

    WHEN: the blocks will be checkpointed, and no adapters are attached yet."""
    is_pinned = device.type == "cuda"
    copier = BlockCopier(device)
    for block in blocks:
        weights = HostWeights(block, is_pinned)
        block.__class__ = offloaded(type(block))  # type: ignore[arg-type]
        block.host_weights, block.copier = weights, copier  # type: ignore[assignment]


def offloaded_blocks(model: nn.Module) -> list[Offloaded]:
    """Return the offloaded blocks of a model."""
    return [module for module in model.modules() if isinstance(module, Offloaded)]


def evenly_spaced(blocks: list[nn.Module], number: int) -> list[nn.Module]:
    """Return so many of the blocks. A copy then has the time of several blocks."""
    return [blocks[(2 * i + 1) * len(blocks) // (2 * number)] for i in range(number)]
