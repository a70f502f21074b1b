"""Precision of matrix products of fp32 numbers on GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

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
