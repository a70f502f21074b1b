"""Weights of noise levels in the loss, as factors on the squared error of x0: one formula each for
every prediction.

The papers weight other errors; at signal-to-noise ratio snr and s = sigma / (signal + sigma) the squared errors are
  of epsilon   snr times that of x0
  of velocity  1 / s^2 times that of x0 (s is flow matching's sigma)
so a weight on theirs is that factor times as much on x0's. A prediction's own error is turned into x0's by to_x0.
"""

import math

from torch import Tensor

from objectives.config import ObjectiveConfig
from objectives.processes import Levels


def min_snr(levels: Levels, options: ObjectiveConfig) -> Tensor:
    """min(snr, gamma) on x0 (Hang et al. 2023, arXiv 2303.09556)."""
    return levels.snr.clamp(max=options.min_snr_gamma)


def debiased(levels: Levels, options: ObjectiveConfig) -> Tensor:
    """1 / sqrt(snr) on epsilon (Yu et al. 2023, arXiv 2310.08442)."""
    return levels.signal / levels.sigma


def p2(levels: Levels, options: ObjectiveConfig) -> Tensor:
    """1 / (k + snr)^gamma on epsilon (Choi et al. 2022, arXiv 2204.00227)."""
    return levels.snr / (options.p2_k + levels.snr) ** options.p2_gamma


def sigma2(levels: Levels, options: ObjectiveConfig) -> Tensor:
    """s^2 on velocity: the plain error of x0."""
    return levels.share.new_ones(()).expand_as(levels.share)


def inverse_sigma2(levels: Levels, options: ObjectiveConfig) -> Tensor:
    """1 / s^2 on velocity (diffusers' `sigma_sqrt`, compute_loss_weighting_for_sd3), whose s are of
    a thousand."""
    return levels.share.clamp(min=1e-3) ** -2 * levels.share**-2


def cosmap(levels: Levels, options: ObjectiveConfig) -> Tensor:
    """2 / (pi (1 - 2 s + 2 s^2)) on velocity (Esser et al. 2024, arXiv 2403.03206; as in
    diffusers)."""
    s = levels.share
    return 2 / (math.pi * (1 - 2 * s + 2 * s**2)) / s**2
