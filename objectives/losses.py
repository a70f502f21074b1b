"""Losses as functions of the error alone, elementwise, with delta = 1. objectives/__init__.py lists
them."""

import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR_FROM = 10.0
"""log cosh is linear to within 1e-8 from this error on; cosh itself would soon overflow."""


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(prediction, target, reduction="none")


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    return F.l1_loss(prediction, target, reduction="none")


def huber(prediction: Tensor, target: Tensor) -> Tensor:
    return F.huber_loss(prediction, target, reduction="none")


def smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(prediction, target, reduction="none")


def pseudo_huber(prediction: Tensor, target: Tensor) -> Tensor:
    """sqrt(1 + e^2) - 1 for an error e (Charbonnier et al. 1997). kohya's `huber` is twice this."""
    squared = (prediction - target) ** 2
    return squared / ((1 + squared).sqrt() + 1)  # the same value, but exact for small errors


def log_cosh(prediction: Tensor, target: Tensor) -> Tensor:
    """ln cosh e for an error e: e^2 / 2 for small errors, |e| - ln 2 for large ones."""
    error = (prediction - target).abs()
    curved = error.clamp(max=LINEAR_FROM)
    return torch.log1p(2 * torch.sinh(curved / 2) ** 2) + F.relu(error - LINEAR_FROM)
