"""A run with tensors that have a shape, a dtype and a device, but no values."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from training.memory.cuda_autocast import CudaAutocast


@contextmanager
def fake_tensors(is_gpu: bool) -> Iterator[None]:
    """Create only tensors without values in a block, on the CPU.

    `is_gpu`: autocast treats them as it treats tensors on CUDA devices."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(nn.Module, "_apply", apply_to_module))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if is_gpu:
            stack.enter_context(CudaAutocast())
        yield


def apply_to_module(
    module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """Do what Module._apply does, for tensors whose storage cannot be replaced."""
    if recurse:
        for child in module.children():
            child._apply(function)
    parameters: dict[str, Any] = module._parameters
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        new_tensor = function(parameter.detach())
        if layout_of(new_tensor) != layout_of(parameter):
            parameters[name] = nn.Parameter(new_tensor, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def layout_of(tensor: Tensor) -> tuple:
    """Return what Module.to can change of a tensor."""
    return tensor.dtype, tensor.device, tensor.stride()
