"""Precision of computations in a block."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute products of fp32 numbers in fp32 for a block, also in a run that uses TF32."""
    matmul = torch.backends.cuda.matmul
    earlier_precision = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = earlier_precision


def without_autocast(device: str) -> AbstractContextManager:
    """Turn autocast off for a block."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def is_autocast_on(device: torch.device) -> bool:
    """Return whether products on a device are computed by autocast now."""
    if not torch.amp.is_autocast_available(device.type):
        return False
    return torch.is_autocast_enabled(device.type)
