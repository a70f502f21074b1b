"""Counts the memory of tensors by what they are for, and its peak."""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.quantized_weight import QuantizedWeight

ACTIVATIONS = "activations"


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators create in a block, while they live.

    It works for tensors with values and for those of a FakeTensorMode. Storages of
    earlier tensors count only if they are labeled. Scratch memory within an operator is not seen.
    """

    def __init__(self, unit: int = 1):
        """`unit`: bytes of which each storage takes a multiple, as allocators give it."""
        super().__init__()
        self.unit = unit
        self.category = ACTIVATIONS
        """Category of the storages that are created now."""
        self.current: Counter[str] = Counter()
        """Category -> bytes that live now."""
        self.total = self.peak = 0
        self.at_peak: dict[str, int] = {}
        """`current`, when the total was largest."""
        self._categories: dict[int, str] = {}
        self._sizes: dict[int, int] = {}

    def label(self, tensors: Iterable[Tensor], category: str) -> None:
        """Put the storages of tensors into a category, which is also done for earlier tensors."""
        for tensor in tensors:
            for part in stored_tensors(tensor):
                self._add(part, category)

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.at_peak = self.total, dict(self.current)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(type_, QuantizedWeight) for type_ in types):
            return NotImplemented  # the weight computes with its stored tensors, which are counted
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf, None)
        return out

    def _add(self, tensor: Tensor, category: str | None) -> None:
        """Count a storage. A storage that is counted already moves to `category`, if it is given."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._categories:
            if category is not None:
                self._move(key, category)
            return
        category = category or self.category
        size = -(-storage.nbytes() // self.unit) * self.unit
        self._categories[key], self._sizes[key] = category, size
        weakref.finalize(storage, self._remove, key)
        self.current[category] += size
        self.total += size
        if self.total > self.peak:
            self.reset_peak()

    def _move(self, key: int, category: str) -> None:
        size = self._sizes[key]
        self.current[self._categories[key]] -= size
        self.current[category] += size
        self._categories[key] = category

    def _remove(self, key: int) -> None:
        category = self._categories.pop(key)
        size = self._sizes.pop(key)
        self.current[category] -= size
        self.total -= size


def stored_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that hold the values of a tensor: itself, or those of a quantized one."""
    if isinstance(tensor, QuantizedWeight):
        return list(tensor.stored.values())
    return [tensor]
