"""What a Linear or Conv layer computes from its weight, and the gradients of that: the same three
calls for all of them.

`y = op(x, W, b)`, `dx = op.input_grad(dy, W, x.shape)`, `dW = op.weight_grad(dy, x, W.shape)`. The
adapters' own forward and backward passes are written with these, so none of them asks what kind of
layer it is on.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAPTED_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class LayerOp:
    """A layer without its weight. `spatial` is the number of spatial dimensions, 0 for Linear."""

    spatial: int
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    prepad: tuple[int, ...] = ()
    """What F.pad is given before: padding that is circular, reflected, or not the same on both
    sides."""
    prepad_mode: str = "constant"

    @classmethod
    def of(cls, layer: Any) -> "LayerOp":
        """The operation of a Linear or Conv layer."""
        if isinstance(layer, nn.Linear):
            return cls(0)
        spatial = len(layer.kernel_size)
        plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        sides = () if plain else tuple(layer._reversed_padding_repeated_twice)
        padding = layer.padding if plain else (0,) * spatial
        return cls(
            spatial,
            layer.stride,
            padding,
            layer.dilation,
            layer.groups,
            sides if any(sides) else (),
            mode,
        )

    def padded(self, x: Tensor) -> Tensor:
        """`x` as the other calls want it."""
        return F.pad(x, self.prepad, mode=self.prepad_mode) if self.prepad else x

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.spatial:
            return F.linear(x, weight, bias)
        convolution = CONVOLUTIONS[self.spatial - 1]
        return convolution(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_grad(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of `shape`, whose values are not needed."""
        if not self.spatial:
            return torch.mm(rows(grad), weight).view(shape)
        return self._backward(grad, blank(grad, shape), weight, (True, False, False))[0]

    def weight_grad(self, grad: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of a weight of `shape`, whose values are not needed."""
        if not self.spatial:
            return torch.mm(rows(grad).T, rows(x))
        return self._backward(grad, x, blank(grad, shape), (False, True, False))[1]

    def _backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> Any:
        return torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * self.spatial,
            self.groups,
            wanted,
        )

    def ungrouped(self) -> "LayerOp":
        """The operation on one group of channels."""
        return LayerOp(self.spatial, self.stride, self.padding, self.dilation)

    def channel_view(self, bias: Tensor) -> Tensor:
        """A vector over the output channels, shaped to meet an output."""
        return bias.view(-1, *[1] * self.spatial)


def blank(like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of which torch looks at the shape and the layout alone; an expanded scalar would be
    copied out."""
    last = (
        like.ndim == 4
        and like.is_contiguous(memory_format=torch.channels_last)
        and not like.is_contiguous()
    )
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on a device, None where it is off or, as on meta, unknown."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(device: str) -> AbstractContextManager:
    return (
        torch.autocast(device, enabled=False)
        if torch.amp.is_autocast_available(device)
        else nullcontext()
    )


def positions(x: Tensor) -> int:
    """How many there are in one channel of one image; known also where there is no image."""
    return math.prod(x.shape[2:])


def added(weight: Tensor, delta: Tensor) -> Tensor:
    """W + dW in the wider dtype of the two, to be rounded once. Said, because float8 has no sums."""
    return weight + delta if weight.dtype.itemsize > 1 else weight.to(delta.dtype) + delta


def rows(x: Tensor) -> Tensor:
    """`x` (..., channels) as a matrix."""
    return x.reshape(-1, x.shape[-1])


def channel_sum(op: LayerOp, y: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over all but the channels of an output."""
    if op.spatial:
        return y.sum((0, *range(2, y.ndim)), dtype=dtype)
    return rows(y).sum(0, dtype=dtype)
