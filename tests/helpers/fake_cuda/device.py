"""A CUDA device made of host memory: tensors on it compute on the CPU, and say that they are on `cuda:0`.

Kernels are those of the CPU, so no figure of speed or rounding means anything here. But PyTorch treats the tensors as
CUDA's: autocast follows CUDA's lists, optimizers take their CUDA path, the host has to copy what it wants to read. So a
run on this device shows what a GPU would complain of, and what it would be asked for:

- an operator whose tensors are on both devices raises MixedDevices; scalars (0 dimensions) may be on the host;
- reads: values that the host waits for (copies to the host, item, operators whose output size depends on values);
- attention: dtype and mask of each call, which decide the kernel;
- products: dtype of each matrix product and convolution.

It is stricter than CUDA where this trainer has no reason to do otherwise: indices on the host and random generators
raise MixedDevices. It is laxer about scalars on the host, which CUDA takes in elementwise operators only.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from helpers.device_reads import is_read

DEVICE = torch.device("cuda", 0)
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution",
            "aten::convolution_backward"}  # fmt: skip


class MixedDevices(RuntimeError):
    """An operator whose tensors are on the host and on the device."""


@dataclass
class Record:
    """What a run asked of the device, each with the label that was set, and how often."""

    label: object = None
    reads: Counter = field(default_factory=Counter)
    """(label, operator, place)"""
    attention: Counter = field(default_factory=Counter)
    """(label, dtype, mask, place)"""
    products: Counter = field(default_factory=Counter)
    """(label, operator, dtype, place)"""

    def add_read(self, operator: str) -> None:
        self.reads[self.label, operator, caller()] += 1


class DeviceTensor(Tensor):
    """A tensor on the device. `content`: its values, on the host."""

    content: Tensor

    @staticmethod
    def __new__(cls, content: Tensor) -> "DeviceTensor":
        return Tensor._make_wrapper_subclass(
            cls, content.shape, strides=content.stride(), storage_offset=content.storage_offset(),
            dtype=content.dtype, layout=content.layout, device=DEVICE,
        )  # fmt: skip

    def __init__(self, content: Tensor):
        self.content = content

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.content})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on the device, outside of fake_cuda()")


class FakeCuda(TorchDispatchMode):
    """Runs operators on tensors of the device, and checks and records them."""

    def __init__(self, record: Record):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        target = target_device(kwargs)
        if not on_device and target != "cuda":
            return func(*args, **kwargs)
        if name == "aten::copy_":
            return self.copy_into(*args, **kwargs)
        is_copy = name == "aten::_to_copy"
        is_copy_to_host = is_copy and target == "cpu"
        if name == "aten::index" and isinstance(tensors[0], DeviceTensor):
            # PyTorch takes indices of the host, as Qwen2.5-VL's vision tower has them, and waits to copy them
            if len(on_device) < len(tensors):
                self.record.add_read("indices of the host")
        elif not is_copy:
            check_devices(name, tensors, kwargs)
        if is_copy_to_host:
            self.record.add_read("copy to the host")
        if is_read(name, args, kwargs):
            self.record.add_read(name)
        if name in PRODUCTS:
            dtype = dtype_name(on_device[0].dtype)
            self.record.products[self.record.label, name, dtype, caller()] += 1
        return run_on_host(func, args, kwargs, wrap_result=not is_copy_to_host)

    def copy_into(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Copies between the devices, or on one of them."""
        if isinstance(source, DeviceTensor) and not isinstance(target, DeviceTensor):
            self.record.add_read("copy to the host")
        content_of(target).copy_(content_of(source))
        return target


def target_device(kwargs: dict[str, Any]) -> str | None:
    """The kind of device that the result is asked to be on."""
    device = kwargs.get("device")
    return None if device is None else torch.device(device).type


def check_devices(name: str, tensors: list[Tensor], kwargs: dict[str, Any]) -> None:
    """Raises MixedDevices for a host tensor that has dimensions, or a random generator of the host."""
    places = [
        ("device" if isinstance(tensor, DeviceTensor) else "host", tuple(tensor.shape))
        for tensor in tensors
    ]
    on_host = [shape for place, shape in places if place == "host" and shape]
    if on_host and len(on_host) < len(places):
        raise MixedDevices(f"{name} of {places} in {caller()}")
    if kwargs.get("generator") is not None:
        raise MixedDevices(f"{name} on the device with a generator of the host in {caller()}")


def run_on_host(func: Any, args: Any, kwargs: dict[str, Any], wrap_result: bool) -> Any:
    """Runs an operator on the contents."""
    host_args, host_kwargs = tree_map_only(DeviceTensor, content_of, (args, kwargs))
    if "device" in host_kwargs:
        host_kwargs["device"] = torch.device("cpu")
    host_kwargs.pop("pin_memory", None)
    result = func(*host_args, **host_kwargs)
    if not wrap_result:
        return result
    result = tree_map_only(Tensor, DeviceTensor, result)
    return return_and_correct_aliasing(func, args, kwargs, result)


def content_of(tensor: Tensor) -> Tensor:
    return tensor.content if isinstance(tensor, DeviceTensor) else tensor


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def caller() -> str:
    """Returns folder/file:function of the innermost frame of the project."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        is_ours = "site-packages" not in code.co_filename and not code.co_filename.startswith("<")
        if (
            is_ours
            and "fake_cuda" not in code.co_filename
            and "/lib/python" not in code.co_filename
        ):
            return f"{'/'.join(code.co_filename.split('/')[-2:])}:{code.co_name}"
        frame = frame.f_back
    return "backward"


@contextmanager
def fake_cuda() -> Iterator[Record]:
    """Makes the device available for a block; yields the record of what it was asked for."""
    record = Record()
    # torch.tensor(..., device="cuda") makes a tensor on the host and moves it
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with patched_driver(), patched_attention(record), FakeCuda(record):
            yield record
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


@contextmanager
def patched_attention(record: Record) -> Iterator[None]:
    """Records the calls of scaled_dot_product_attention on the device."""
    arguments = ("dropout_p", "is_causal")
    original = torch.nn.functional.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ):
        if not isinstance(query, DeviceTensor):
            return original(query, key, value, attn_mask, *args, **kwargs)
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        mask = "none" if attn_mask is None else dtype_name(attn_mask.dtype)
        record.attention[record.label, dtype_name(query.dtype), mask, caller()] += 1
        check_devices(
            "scaled_dot_product_attention",
            [query, key, value, *([] if attn_mask is None else [attn_mask])],
            {},
        )
        mask_content = None if attn_mask is None else content_of(attn_mask)
        on_host = partial(
            original, attn_mask=mask_content, **dict(zip(arguments, args, strict=False)), **kwargs
        )
        return FusedAttention.apply(query, key, value, on_host)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
        yield


class FusedAttention(torch.autograd.Function):
    """Attention as one operator, which it is on a GPU: the CPU build would take its parts there."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, attention: Any) -> Tensor:
        ctx.inputs = [
            content_of(tensor).detach().requires_grad_() for tensor in (query, key, value)
        ]
        with torch.enable_grad():
            ctx.output = attention(*ctx.inputs)
        return DeviceTensor(ctx.output.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = torch.autograd.grad(ctx.output, ctx.inputs, content_of(grad))
        return (*(DeviceTensor(tensor) for tensor in grads), None)


class FakeStream:
    """A stream whose work is done at once."""

    def __init__(self, *_: Any):
        pass

    def wait_stream(self, other: "FakeStream") -> None:
        pass

    def wait_event(self, event: str) -> None:
        assert event == "event"

    def record_event(self) -> str:
        return "event"


@contextmanager
def patched_driver() -> Iterator[None]:
    """Replaces the functions of torch.cuda that ask the driver, for a block."""
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True,
        "get_device_capability": (9, 0), "get_device_name": "fake", "is_bf16_supported": True,
        "mem_get_info": (80 * 10**9, 80 * 10**9), "max_memory_allocated": 0, "memory_allocated": 0,
        "memory_reserved": 0, "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }  # fmt: skip
    silent = ["set_device", "empty_cache", "synchronize", "manual_seed", "manual_seed_all", "_lazy_init", "init",
              "reset_peak_memory_stats", "set_rng_state", "seed_all"]  # fmt: skip
    functions = {name: mock.Mock(return_value=answer) for name, answer in answers.items()}
    functions |= {name: mock.Mock(return_value=None) for name in silent}
    functions |= {
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": lambda _: nullcontext(),
    }
    # a module that moves to the device keeps its Parameter objects, as on a real one
    keeps_parameters = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with (
            mock.patch.multiple(torch.cuda, **functions),
            mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, *_: tensor),
            mock.patch.object(torch.utils.weakref, "getweakrefs", return_value=[]),
        ):
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(keeps_parameters)
