"""Loss functions by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BEND = 10.0  # from here on log cosh is linear to within 1e-8, and cosh would soon overflow


def pseudo_huber(prediction: Tensor, target: Tensor, reduction: str) -> Tensor:
    """sqrt(1 + e^2) - 1 elementwise (Charbonnier et al. 1997; half of kohya's `huber`, which is 2 times this)."""
    squared = (prediction - target) ** 2
    return squared / ((1 + squared).sqrt() + 1)  # the same, exact for small e


def log_cosh(prediction: Tensor, target: Tensor, reduction: str) -> Tensor:
    """ln cosh e elementwise: e^2 / 2 for small errors, |e| - ln 2 for large ones."""
    size = (prediction - target).abs()
    bent = size.clamp(max=BEND)
    return torch.log1p(2 * torch.sinh(bent / 2) ** 2) + F.relu(size - BEND)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "MSE": F.mse_loss,
    "L1": F.l1_loss,
    "Huber": F.huber_loss,
    "SmoothL1": F.smooth_l1_loss,
    "pseudo-Huber": pseudo_huber,
    "log-cosh": log_cosh,
}
"""Functions of the difference alone, with delta = 1."""


POWERS = {"Huber": 2, "SmoothL1": 1, "pseudo-Huber": 2}
"""The loss with another delta is delta^power times that of the error / delta."""
