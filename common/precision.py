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


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype that autocast computes in; None if it is off or, as on meta, unknown."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
