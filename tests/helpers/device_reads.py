"""Counts what would make the host wait for a GPU, on a machine without one.

An operator hands a tensor's value to Python (item, float, bool, `if tensor`), or has an output whose size depends on
values; Tensor.cpu, numpy, tolist and to("cpu") copy to the host. What cannot be seen here: Tensor.to with a device
object and copies from memory that is not pinned, which do nothing on a CPU.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2",
         "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave"}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
METHODS = ("cpu", "numpy", "tolist", "to")


@dataclass(frozen=True)
class Read:
    """One read: the `label` that was set, its kind, and where it happened as file:line."""

    label: object
    kind: str
    where: str


class DeviceReads(TorchDispatchMode):
    """Records the reads of a block into `reads`, each with the `label` that was set at the time."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[Read] = []
        self.label: object = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        masked = name in INDEXING and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        # with its output size given, repeat_interleave needs no value
        sized = name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is not None
        if masked or (name in READS and not sized):
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, kind: str) -> None:
        self.reads.append(Read(self.label, kind, callers()))

    def of(self, label: object) -> list[Read]:
        return [read for read in self.reads if read.label == label]


def callers() -> str:
    """file:line of the innermost frame outside this file, and of the innermost one outside the installed packages."""
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
    """Counts the reads of the block."""
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
