"""Counts reads that would make the host wait for a GPU, on a machine without one.

A read is an operator that gives a tensor's value to Python (item, float, bool, `if tensor`), an operator whose output
size depends on values, or a copy to the host (Tensor.cpu, numpy, tolist, to("cpu")). Two reads are not visible here,
because they do nothing on a CPU: Tensor.to with a device object, and copies from memory that is not pinned.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2",
         "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave"}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
METHODS = ("cpu", "numpy", "tolist", "to")


@dataclass(frozen=True)
class Read:
    """One read: the `label` that was set, its kind, and its place as file:line."""

    label: object
    kind: str
    where: str


class DeviceReads(TorchDispatchMode):
    """Records the reads of a block into `reads`, each with the current `label`."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[Read] = []
        self.label: object = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        if is_read(name, args, kwargs):
            self.note(name)
        return func(*args, **kwargs)

    def note(self, kind: str) -> None:
        self.reads.append(Read(self.label, kind, callers()))

    def of(self, label: object) -> list[Read]:
        return [read for read in self.reads if read.label == label]


def is_read(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host waits for values in an operator."""
    if name in INDEXING:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "aten::repeat_interleave":  # it reads no value if the output size is an argument
        return kwargs.get("output_size") is None
    return name in READS


def callers() -> str:
    """Return file:line of the innermost frame outside this file, and of the innermost one in this project."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        ours = "site-packages" not in file
        if file != __file__ and (ours or not found):
            found.append(f"{file.split('site-packages/')[-1]}:{frame.f_lineno}")
            if ours:
                break
        frame = frame.f_back
    return " < ".join(found)


@contextmanager
def device_reads() -> Iterator[DeviceReads]:
    """Count the reads of a block."""
    counter, originals = DeviceReads(), {name: getattr(torch.Tensor, name) for name in METHODS}

    def counted(name: str):
        def method(tensor, *args, **kwargs):
            if name != "to" or "cpu" in (*args, kwargs.get("device")):
                counter.note(f"Tensor.{name}")
            return originals[name](tensor, *args, **kwargs)

        return method

    for name in METHODS:
        setattr(torch.Tensor, name, counted(name))
    try:
        with counter:
            yield counter
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)
