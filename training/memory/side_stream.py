"""Copies between the memory of the host and a device, while the device computes."""

import weakref
from typing import Any

import torch
from torch import Tensor

SIDE_STREAM_DEVICES = ("cuda", "xpu")
"""Devices whose streams are used. On other devices the computation waits for each copy."""
Event = Any
"""Event after a copy, or None if it was done at once."""


class SideStream:
    """A stream for copies. On the CPU, copies are done at once.

    Tensors on the device are allocated and freed in the order of the computation. So a copy waits
    for the computation up to now, and the computation has to wait for the copy before it uses or frees
    a tensor that is copied: `wait`."""

    def __init__(self, device: torch.device):
        """`device`: the device that computes."""
        self.device = device
        self.streams: Any = None
        self.stream: Any = None
        if device.type in SIDE_STREAM_DEVICES:
            self.streams = torch.get_device_module(device)
            self.stream = self.streams.Stream(device)

    def to_device(self, source: Tensor) -> tuple[Tensor, Event]:
        """Start to copy a pinned tensor to the device."""
        if self.stream is None:
            return source.to(self.device, copy=True), None
        target = torch.empty_like(source, device=self.device)
        return target, self._copy(target, source)

    def to_host(self, source: Tensor) -> tuple[Tensor, Event]:
        """Start to copy a tensor of the device to pinned memory."""
        if self.stream is None:
            return source.to("cpu", copy=True), None
        target = torch.empty_like(
            source,
            device="cpu",
            pin_memory=torch.accelerator.is_available(),
        )
        return target, self._copy(target, source)

    def _copy(self, target: Tensor, source: Tensor) -> Event:
        computation = self.streams.current_stream(self.device)
        self.stream.wait_stream(computation)
        with self.streams.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, event: Event) -> None:
        """Let the computation wait for a copy."""
        if event is None:
            return
        computation = self.streams.current_stream(self.device)
        computation.wait_event(event)


def pin(buffer: Tensor) -> bool:
    """Pin the memory of a tensor, so that copies to a GPU need not wait; return whether it worked.

    `Tensor.pin_memory` would round its size up to a power of two."""
    cudart = torch.cuda.cudart()
    if cudart is None:
        return False
    address = buffer.data_ptr()
    if int(cudart.cudaHostRegister(address, buffer.nbytes, 0)) != 0:
        return False
    weakref.finalize(buffer, cudart.cudaHostUnregister, address)
    return True
