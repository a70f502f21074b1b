"""The operation of a Linear or Conv layer and its gradients: three calls that are alike for all.

`y = op(x, W, b)`, `dx = op.input_grad(dy, W, x.shape)`, `dW = op.weight_grad(dy, x, W.shape)`. The
forward and backward passes of adapters are written with these calls. So they do not depend on the
type of the layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTION_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ADAPTED_TYPES = (nn.Linear, *CONVOLUTION_TYPES)
CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class LayerOp:
    """A layer without its weight."""

    spatial_dims: int
    """Number of spatial dimensions; 0 for Linear."""
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    extra_padding: tuple[int, ...] = ()
    """Argument of F.pad for padding that is circular, reflected or not the same on both sides."""
    extra_padding_mode: str = "constant"

    @classmethod
    def of(cls, layer: Any) -> "LayerOp":
        """Return the operation of a layer. All layers but convolutions have that of Linear."""
        if not isinstance(layer, CONVOLUTION_TYPES):
            return cls(0)
        spatial_dims = len(layer.kernel_size)
        pads_zeros = layer.padding_mode == "zeros"
        if pads_zeros and not isinstance(layer.padding, str):
            return cls(spatial_dims, layer.stride, layer.padding, layer.dilation, layer.groups)
        sides = tuple(layer._reversed_padding_repeated_twice)
        return cls(
            spatial_dims,
            layer.stride,
            padding=(0,) * spatial_dims,
            dilation=layer.dilation,
            groups=layer.groups,
            extra_padding=sides if any(sides) else (),
            extra_padding_mode="constant" if pads_zeros else layer.padding_mode,
        )

    @property
    def channel_axis(self) -> int:
        """Axis of the channels of an input or output."""
        return 1 if self.spatial_dims else -1

    def pad(self, x: Tensor) -> Tensor:
        """Return an input as the other calls take it."""
        if not self.extra_padding:
            return x
        return F.pad(x, self.extra_padding, mode=self.extra_padding_mode)

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        if not self.spatial_dims:
            return F.linear(x, weight, bias)
        convolution = CONVOLUTIONS[self.spatial_dims - 1]
        return convolution(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_grad(
        self,
        grad: Tensor,
        weight: Tensor,
        shape: torch.Size,
    ) -> Tensor:
        """Return the gradient of an input of `shape`, whose values are not needed.

        That of a Linear layer is a matrix (tokens, channels)."""
        if not self.spatial_dims:
            return torch.mm(as_matrix(grad), weight)
        x = without_values(grad, shape)
        return self._convolution_grads(grad, x, weight, (True, False, False))[0]

    def weight_grad(
        self,
        grad: Tensor,
        x: Tensor,
        shape: torch.Size,
    ) -> Tensor:
        """Return the gradient of a weight of `shape`, whose values are not needed."""
        if not self.spatial_dims:
            return wide_product(as_matrix(grad).T, as_matrix(x))
        weight = without_values(grad, shape)
        return self._convolution_grads(grad, x, weight, (False, True, False))[1]

    def _convolution_grads(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        output_mask: tuple[bool, bool, bool],
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
            [0] * self.spatial_dims,
            self.groups,
            output_mask,
        )

    def for_one_group(self) -> "LayerOp":
        """Return the operation on one group of channels."""
        return LayerOp(self.spatial_dims, self.stride, self.padding, self.dilation)

    def channel_view(self, vector: Tensor) -> Tensor:
        """Return a vector over the output channels, shaped to be broadcast over an output."""
        return vector.view(-1, *[1] * self.spatial_dims)


def without_values(like: Tensor, shape: torch.Size) -> Tensor:
    """Return a tensor for operations that read its shape and layout alone.

    torch would copy an expanded scalar out."""
    is_channels_last = (
        like.ndim == 4
        and not like.is_contiguous()
        and like.is_contiguous(memory_format=torch.channels_last)
    )
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def scaled(tensor: Tensor, scaling: float) -> Tensor:
    """Return the tensor times `scaling`; the tensor itself if that is 1."""
    return tensor if scaling == 1 else tensor * scaling


def num_positions(x: Tensor) -> int:
    """Count the positions in one channel of one image. An empty batch has a count too."""
    return math.prod(x.shape[2:])


def as_matrix(x: Tensor) -> Tensor:
    """Return `x` (..., channels) as a matrix (tokens, channels)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def wider_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp32 for narrower dtypes, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two matrices, in fp32 where the device can: for gradients of factors.

    Then the sum over tokens is not rounded to a narrow dtype, and needs no conversion."""
    is_narrow = a.dtype in (torch.bfloat16, torch.float16)
    if is_narrow and a.is_cuda and torch.version.cuda is not None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def channel_sums(op: LayerOp, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of an output over everything but its channels."""
    if op.spatial_dims:
        return y.sum((0, *range(2, y.ndim)), dtype=dtype)
    return as_matrix(y).sum(0, dtype=dtype)


def add_update(weight: Tensor, delta: Tensor) -> Tensor:
    """Return W + dW in the wider dtype of the two; the caller rounds it once.

    float8 has no sums, so such a weight is converted first."""
    if weight.dtype.itemsize == 1:
        weight = weight.to(delta.dtype)
    return weight + delta
