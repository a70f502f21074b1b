"""Loss weightings by noise level: factors on the squared error of x0, one formula each.

A factor holds for every prediction type, because `NoiseLevels.to_x0` turns the error of a
prediction into that of x0. The papers weight other errors, at the signal-to-noise ratio snr and
with s = sigma / (signal + sigma), flow matching's sigma. The squared error of epsilon is snr times
that of x0. The squared error of velocity is 1 / s^2 times that of x0. A published weight is
multiplied by this factor to become a weight on the error of x0.
"""

import math

from torch import Tensor

from objectives.config import ObjectiveConfig
from objectives.processes import NoiseLevels

MIN_FLOW_SIGMA = 1e-3
"""diffusers knows the levels 1 / 1000, 2 / 1000, ..., and 1 / s^2 would grow without limit."""


def min_snr(levels: NoiseLevels, options: ObjectiveConfig) -> Tensor:
    """Return min(snr, gamma) on x0 (Hang et al. 2023, arXiv 2303.09556)."""
    return levels.snr.clamp(max=options.min_snr_gamma)


def debiased(levels: NoiseLevels, options: ObjectiveConfig) -> Tensor:
    """Return 1 / sqrt(snr) on epsilon (Yu et al. 2023, arXiv 2310.08442)."""
    return levels.signal / levels.sigma


def p2(levels: NoiseLevels, options: ObjectiveConfig) -> Tensor:
    """Return 1 / (k + snr)^gamma on epsilon (Choi et al. 2022, arXiv 2204.00227)."""
    snr = levels.snr
    return snr / (options.p2_k + snr) ** options.p2_gamma


def sigma2(levels: NoiseLevels, options: ObjectiveConfig) -> Tensor:
    """Return s^2 on velocity: the plain error of x0."""
    s = levels.flow_sigma
    return s.new_ones(()).expand_as(s)


def inverse_sigma2(levels: NoiseLevels, options: ObjectiveConfig) -> Tensor:
    """Return 1 / s^2 on velocity.

    diffusers calls this weighting `sigma_sqrt` (compute_loss_weighting_for_sd3)."""
    s = levels.flow_sigma
    weight = s.clamp(min=MIN_FLOW_SIGMA) ** -2
    return weight * s**-2


def cosmap(levels: NoiseLevels, options: ObjectiveConfig) -> Tensor:
    """Return 2 / (pi (1 - 2 s + 2 s^2)) on velocity.

    This is the density of the cosmap timestep sampling (Esser et al. 2024, arXiv 2403.03206)."""
    s = levels.flow_sigma
    density = 2 / (math.pi * (1 - 2 * s + 2 * s**2))
    return density / s**2
