"""Counts the memory of tensors by what they are for, and its peak."""

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from models.quantized_weight import QuantizedWeight, stored_parts
from training.memory.phase_memory import ACTIVATIONS, HOST


@dataclass
class Storage:
    """A storage that lives."""

    category: str
    size: int


class LiveBytes(TorchDispatchMode):
    """Counts the storages of the results of operators in a block, while they live.

    The total is that of the device: it leaves out the category HOST. It works for tensors with
    values and for those of a FakeTensorMode. Label earlier tensors first: a view of one would count as
    a new storage. Scratch memory within an operator is not seen."""

    def __init__(self, unit: int = 1):
        """`unit`: each storage takes a multiple of so many bytes, as allocators give it."""
        super().__init__()
        self.unit = unit
        self.category = ACTIVATIONS
        """Category of the storages that are created now."""
        self.current: Counter[str] = Counter()
        """Category -> bytes that live now."""
        self.total = 0
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        """`current`, when the total was largest."""
        self._storages: dict[int, Storage] = {}

    def label(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count the storages of tensors in a category, also those that were counted in another."""
        for tensor in tensors:
            for part in stored_parts(tensor):
                storage = self._count(part)
                self._add(storage.category, -storage.size)
                self._add(category, storage.size)
                storage.category = category

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.total
        self.at_peak = dict(self.current)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        for tensor_class in types:
            if issubclass(tensor_class, QuantizedWeight):
                # the weight computes with its stored tensors, and these are counted
                return NotImplemented
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> Storage:
        """Return the entry of a tensor's storage, which is counted if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return self._storages[key]
        num_units = math.ceil(storage.nbytes() / self.unit)
        entry = Storage(self.category, num_units * self.unit)
        self._storages[key] = entry
        weakref.finalize(storage, self._remove, key)
        self._add(entry.category, entry.size)
        if self.total > self.peak:
            self.reset_peak()
        return entry

    def _remove(self, key: int) -> None:
        entry = self._storages.pop(key)
        self._add(entry.category, -entry.size)

    def _add(self, category: str, size: int) -> None:
        """Add bytes to a category, and to the total if they are on the device."""
        self.current[category] += size
        if category != HOST:
            self.total += size


@contextmanager
def counted_as(category: str) -> Iterator[None]:
    """Let the LiveBytes that counts, if there is one, count new tensors in a block as this category."""
    modes = _get_current_dispatch_mode_stack()
    counters = [mode for mode in modes if isinstance(mode, LiveBytes)]
    earlier_categories = [counter.category for counter in counters]
    for counter in counters:
        counter.category = category
    try:
        yield
    finally:
        for counter, earlier_category in zip(counters, earlier_categories, strict=True):
            counter.category = earlier_category
