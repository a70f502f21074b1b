"""A frozen weight that is stored in fewer bits and acts as a tensor of its shape and dtype.

Layers, adapters and files use it as they use any weight: an operator gets its values, which are
computed for this operator alone and then freed. A backward pass saves the stored form. So nothing
else of the program knows that a model is quantized.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
StoredTensors = dict[str, Tensor]
"""Tensors of a format, by name."""


class Format(NamedTuple):
    """A way to store a matrix (out, in) in fewer bits."""

    name: str
    quantize: Callable[[Tensor], StoredTensors]
    values: Callable[[StoredTensors, torch.Size, torch.dtype], Tensor]
    """(stored, shape, dtype) -> the matrix."""


class QuantizedWeight(Tensor):
    """A matrix in a format. Nothing trains it."""

    format: Format
    stored: StoredTensors
    dtype_of_values: torch.dtype
    is_transposed: bool

    @staticmethod
    def __new__(
        cls,
        format: Format,
        stored: StoredTensors,
        shape: torch.Size,
        dtype: torch.dtype,
        is_transposed: bool = False,
    ) -> "QuantizedWeight":
        """`shape`: as a layer has it. `is_transposed`: this tensor is the transposed matrix."""
        device = next(iter(stored.values())).device
        visible_shape = shape[::-1] if is_transposed else shape
        return Tensor._make_wrapper_subclass(cls, visible_shape, dtype=dtype, device=device)

    def __init__(
        self,
        format: Format,
        stored: StoredTensors,
        shape: torch.Size,
        dtype: torch.dtype,
        is_transposed: bool = False,
    ):
        self.format = format
        self.stored = stored
        self.stored_shape = shape
        self.dtype_of_values = dtype
        self.is_transposed = is_transposed

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantizedWeight({self.format.name}, {tuple(self.shape)}, {self.dtype})"

    def values(self) -> Tensor:
        """Return the matrix as a plain tensor."""
        matrix = self.format.values(self.stored, self.stored_shape, self.dtype_of_values)
        return matrix.T if self.is_transposed else matrix

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        """Return attributes that are tensors, and the rest, so that PyTorch can move the weight."""
        for name, tensor in self.stored.items():
            setattr(self, name, tensor)
        context = (
            self.format,
            self.stored_shape,
            self.dtype_of_values,
            self.is_transposed,
        )
        return list(self.stored), context

    @staticmethod
    def __tensor_unflatten__(
        stored: StoredTensors,
        context: tuple,
        outer_size: Any,
        outer_stride: Any,
    ) -> "QuantizedWeight":
        format, shape, dtype, is_transposed = context
        return QuantizedWeight(format, stored, shape, dtype, is_transposed)

    @property
    def num_bytes(self) -> int:
        """Size of the stored form."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    def with_tensors(
        self,
        stored: StoredTensors,
        dtype: torch.dtype | None = None,
    ) -> "QuantizedWeight":
        """Return the same matrix with other stored tensors, or with values in another dtype."""
        return QuantizedWeight(
            self.format,
            stored,
            self.stored_shape,
            dtype or self.dtype_of_values,
            self.is_transposed,
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        is_weight_first = isinstance(args[0], QuantizedWeight)
        if is_weight_first and func in HANDLERS:
            return HANDLERS[func](*args, **kwargs)
        plain_args, plain_kwargs = tree_map_only(
            QuantizedWeight,
            QuantizedWeight.values,
            (args, kwargs),
        )
        result = func(*plain_args, **plain_kwargs)
        changes_weight = is_weight_first and func._schema.is_mutable
        return copied(args[0], result) if changes_weight else result


def transposed(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(
        weight.format,
        weight.stored,
        weight.stored_shape,
        weight.dtype_of_values,
        not weight.is_transposed,
    )


def detached(weight: QuantizedWeight) -> QuantizedWeight:
    return weight.with_tensors(weight.stored)


def cloned(weight: QuantizedWeight, **_: Any) -> QuantizedWeight:
    stored = {}
    for name, tensor in weight.stored.items():
        stored[name] = tensor.clone()
    return weight.with_tensors(stored)


def converted(
    weight: QuantizedWeight,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **_: Any,
) -> QuantizedWeight:
    """Return the weight on another device, or with values in another dtype."""
    stored = {}
    for name, tensor in weight.stored.items():
        stored[name] = tensor.to(device, non_blocking=non_blocking)
    return weight.with_tensors(stored, dtype)


@torch.no_grad()
def copied(weight: QuantizedWeight, source: Tensor, non_blocking: bool = False) -> QuantizedWeight:
    """Write values into a weight, rounded to its format.

    The stored tensors of a source in the same format are copied."""
    if isinstance(source, QuantizedWeight) and source.format is weight.format:
        new_tensors = source.stored
    else:
        new_tensors = weight.format.quantize(as_stored(weight, source))
    for name, tensor in weight.stored.items():
        tensor.copy_(new_tensors[name])
    return weight


def as_stored(weight: QuantizedWeight, source: Tensor) -> Tensor:
    """Return plain values for a weight, in the orientation in which it is stored."""
    values = plain_values(source)
    return values.T if weight.is_transposed else values


HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.t.default: transposed,
    aten.detach.default: detached,
    aten.alias.default: detached,
    aten.clone.default: cloned,
    aten._to_copy.default: converted,
    aten.copy_.default: copied,
}
"""Operators that keep the stored form. All others get the values."""


def stored_parts(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that hold the values of a tensor: itself, or those of a quantized one."""
    if isinstance(tensor, QuantizedWeight):
        return list(tensor.stored.values())
    return [tensor]


def plain_values(tensor: Tensor) -> Tensor:
    """Return the values of a tensor that may be quantized."""
    return tensor.values() if isinstance(tensor, QuantizedWeight) else tensor
