"""Correctness of adapted layers on a GPU, for benchmarks/gpu.py: bf16 there against fp32 on the CPU."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.implementations import Setting, ours, setting

SETTINGS = (
    setting("LoRA", "LoRA"),
    setting("DoRA", "DoRA"),
    setting("LoHa", "LoHa", 8),
    setting("LoKr", "LoKr", factor=8),
    setting("OFT", "OFT", block_size=32),
    setting("BOFT", "BOFT", block_size=32),
    setting("GLoRA", "GLoRA"),
    setting("Full", "Full"),
)
MAX_ERROR = 0.03
"""Relative error of bf16 against fp32 on the CPU, of outputs and gradients."""


@dataclass(frozen=True)
class Context:
    """The device, and whether everything is tiny."""

    device: torch.device
    is_tiny: bool

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def counting_waits(self) -> Iterator[list[str]]:
        """Yield a list that gets one text for each time the host waits for the GPU in the block."""
        waits: list[str] = []
        if self.device.type != "cuda":
            yield waits
            return
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as records:
                warnings.simplefilter("always")
                yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for record in records:
            if "synchronizing" in str(record.message):
                waits.append(f"{Path(record.filename).name}:{record.lineno}")


def example_layer(kind: str) -> tuple[nn.Module, Tensor]:
    """Return a layer whose weights bf16 can hold, and an input."""
    torch.manual_seed(0)
    if kind == "Linear":
        layer: nn.Module = nn.Linear(256, 320)
        x = torch.randn(4, 64, 256)
    else:
        layer = nn.Conv2d(64, 96, 3, padding=1)
        x = torch.randn(4, 64, 16, 16)
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return layer.requires_grad_(False), x.bfloat16().float()


def passes(
    module: nn.Module, x: Tensor, trained: list[nn.Parameter], autocast: AbstractContextManager
) -> list[Tensor]:
    """Return the output, the input's gradient and the gradients of the trained tensors."""
    x = x.clone().requires_grad_()
    with autocast:
        y = module(x)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape)
    (y.float() * weights).sum().backward()
    results = [y, x.grad, *(parameter.grad for parameter in trained)]
    for parameter in trained:
        parameter.grad = None
    return [tensor.detach().float().cpu() for tensor in results if tensor is not None]


def layer_errors(measured: Setting, kind: str, is_compiled: bool, context: Context) -> dict:
    """Return the largest relative error of a layer in bf16 on the device. Raises AssertionError."""
    base, x = example_layer(kind)
    reference = ours(measured, base)
    torch.manual_seed(1)
    for parameter in reference.trained:
        parameter.data += 0.02 * torch.randn_like(parameter)
    expected = passes(reference.module, x, reference.trained, nullcontext())
    layer = ours(measured, deepcopy(base).to(context.device, torch.bfloat16))
    for own, other in zip(layer.trained, reference.trained, strict=True):
        own.data = other.data.to(context.device)
    module = torch.compile(layer.module, dynamic=False) if is_compiled else layer.module
    on_device = x.to(context.device)
    passes(module, on_device, layer.trained, context.autocast())  # compiles, and picks kernels
    actual = passes(module, on_device, layer.trained, context.autocast())
    errors = []
    for own, other in zip(actual, expected, strict=True):
        errors.append(((own - other).norm() / other.norm()).item())
    assert max(errors) <= MAX_ERROR, f"relative errors {errors}"
    return {"error": max(errors)}
