"""The only reader of an adapted layer's frozen weight.

A weight may be stored in another form than passes compute with, such as float8. All other code
reads its numbers through this file. So a new form of storage, such as a quantized one, is added
here alone. Shapes and dtypes may be read from the layer directly.
"""

from typing import Any

import torch
from torch import Tensor


def stored_weight(layer: Any) -> Tensor:
    """Return a layer's weight in its stored form, which a backward pass saves without a copy."""
    return layer.weight


def stored_tensors(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a layer in their stored form."""
    parameters = layer._parameters
    weight = parameters.get("weight")
    if weight is None:  # not a parameter itself
        return layer.weight, layer.bias
    return weight, parameters.get("bias")


def mark_temporary(weight: Tensor) -> None:
    """Mark a stored weight that is on the device only while its block computes.

    Nothing may keep it until the backward pass, except tensors that autograd saves."""
    weight.is_temporary = True  # type: ignore[attr-defined]


def is_temporary(stored: Tensor) -> bool:
    """Return whether a stored weight is marked by `mark_temporary`."""
    return getattr(stored, "is_temporary", False)


def weight_values(stored: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the numbers of a stored weight: in `dtype`, or in the stored dtype if None.

    Returns the stored tensor itself if no conversion is needed."""
    return stored if dtype is None else stored.to(dtype)


def frozen_weight(layer: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Return the numbers of a layer's weight, as `weight_values` does."""
    return weight_values(stored_weight(layer), dtype)


@torch.no_grad()
def write_frozen_weight(layer: Any, values: Tensor) -> None:
    """Replace the numbers of a layer's weight, rounded once to the stored dtype."""
    layer.weight.copy_(values)
