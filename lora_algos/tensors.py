"""Tensors of one layer by their names in a file, and checks of their shapes."""

import math

import torch
from torch import Tensor

from common.errors import AdapterError

LayerTensors = dict[str, Tensor]
"""Tensors of one layer by their names in a file, with those in COMMON_NAMES."""
Shapes = dict[str, tuple[int, ...]]
"""Shapes of one layer's tensors by their names in a file."""
ALPHA, BIAS = "alpha", "diff_b"
COMMON_NAMES = (ALPHA, BIAS)
"""Tensors that a layer of any algorithm may have: its alpha, and the change of its bias."""


def to_device(tensors: LayerTensors, device: torch.device) -> LayerTensors:
    """Return a layer's tensors on a device.

    The alpha is read as a number, so it is not moved."""
    moved_tensors: LayerTensors = {}
    for name, tensor in tensors.items():
        moved_tensors[name] = tensor if name == ALPHA else tensor.to(device)
    return moved_tensors


def bias_errors(tensors: LayerTensors, num_channels: int, has_bias: bool | None) -> list[str]:
    """Return errors of the change of a layer's bias. `has_bias` None: not known."""
    if BIAS not in tensors:
        return []
    if has_bias is False:
        return [f"{BIAS}: the layer has no bias"]
    diff_b = tensors[BIAS]
    if diff_b.numel() != num_channels:
        return [f"{BIAS} is {tuple(diff_b.shape)} and should be {(num_channels,)}"]
    return []


def check_shapes(tensors: LayerTensors, shapes: Shapes, weight: torch.Size) -> None:
    """Raise AdapterError unless the layer has tensors of these shapes and no others.

    Tensors of a convolution may be flattened to matrices."""
    update_names = tensors.keys() - {*COMMON_NAMES}
    errors = [f"{name} is missing" for name in sorted(shapes.keys() - update_names)]
    for name in sorted(update_names):
        shape = tuple(tensors[name].shape)
        if name not in shapes:
            errors.append(f"{name} {shape} does not belong to the algorithm")
        elif not is_same_or_flat(shape, shapes[name]):
            errors.append(f"{name} is {shape} and should be {shapes[name]}")
    if errors:
        raise AdapterError(f"for a weight of {tuple(weight)}: {'; '.join(errors)}")


def is_same_or_flat(shape: tuple[int, ...], expected_shape: tuple[int, ...]) -> bool:
    """Return whether a shape is the expected one, or has the same first side and size."""
    has_same_size = math.prod(shape) == math.prod(expected_shape)
    return has_same_size and shape[:1] == expected_shape[:1]
