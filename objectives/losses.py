"""Losses as functions of the error alone, elementwise and with delta = 1.

LOSSES in objectives/__init__.py lists them."""

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_LINEAR_ERROR = 10.0
"""From this error on, log cosh is linear to within 1e-8. cosh itself would overflow soon."""


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Return e^2 for an error e."""
    return F.mse_loss(prediction, target, reduction="none")


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Return |e| for an error e."""
    return F.l1_loss(prediction, target, reduction="none")


def huber(prediction: Tensor, target: Tensor) -> Tensor:
    """Return e^2 / 2 for an error e below 1, and |e| - 1 / 2 above."""
    return F.huber_loss(prediction, target, reduction="none")


def smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the Huber loss; the two differ in their scale when delta is not 1."""
    return F.smooth_l1_loss(prediction, target, reduction="none")


def pseudo_huber(prediction: Tensor, target: Tensor) -> Tensor:
    """Return sqrt(1 + e^2) - 1 for an error e (Charbonnier et al. 1997).

    kohya's `huber` is twice this."""
    squared = (prediction - target) ** 2
    # the same value as sqrt(1 + squared) - 1, but exact for small errors
    return squared / ((1 + squared).sqrt() + 1)


def log_cosh(prediction: Tensor, target: Tensor) -> Tensor:
    """Return ln cosh e for an error e.

    This is e^2 / 2 for small errors and |e| - ln 2 for large ones."""
    error = (prediction - target).abs()
    curved = error.clamp(max=MIN_LINEAR_ERROR)
    linear = F.relu(error - MIN_LINEAR_ERROR)
    return torch.log1p(2 * torch.sinh(curved / 2) ** 2) + linear
