"""Conversion of a layer's input, shared by layers that get the same input one after the other."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor


class LastCast:
    """The newest conversion. It keeps neither its source nor its result alive."""

    def __init__(self) -> None:
        self.source: Callable[[], Tensor | None] = lambda: None
        self.result: Callable[[], Tensor | None] = lambda: None
        self.version = 0

    def get(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the result if it is that of `x` with its present values, else None."""
        if self.source() is not x:
            return None
        if self.version != x._version:
            return None
        result = self.result()
        if result is None or result.dtype != dtype:
            return None
        return result if result.requires_grad == x.requires_grad else None

    def put(self, x: Tensor, result: Tensor) -> None:
        self.source, self.result = weakref.ref(x), weakref.ref(result)
        self.version = x._version


last_cast = LastCast()


def shared_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` in `dtype`: the same tensor for all layers with the same input (q, k, v).

    So the backward passes of these layers save it once."""
    if x.dtype == dtype:
        return x
    is_shareable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not is_shareable or x.is_inference():
        return x.to(dtype)
    result = last_cast.get(x, dtype)
    if result is None:
        result = x.to(dtype)
        last_cast.put(x, result)
    return result
