"""Distributions of the noise level: maps from a uniform quantile to a level t, both in (0, 1).

0 is clean and 1 is pure noise. Every map is an inverse distribution function, so evenly spaced
quantiles give evenly spread levels. logit-normal, mode and cosmap are those of Esser et al. 2024,
"Scaling Rectified Flow Transformers" (arXiv 2403.03206), section 3.1.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from common.errors import ModelError
from objectives import DENSITIES, get_function
from objectives.config import ObjectiveConfig

EPS = 2.0**-24
"""Quantiles and levels stay between EPS and 1 - EPS, the largest fp32 number below 1."""
TABLE_SIZE = 2**15
"""Entries of the table of a beta distribution."""
MAX_LOGIT = 17.5
"""Levels with a larger logit are clamped to 1 - EPS anyway."""
NUM_BISECTIONS = 60
MIN_MASS = 1e-6
"""Smallest probability that --objective.timestep_range may leave."""

Inverse = Callable[[Tensor], Tensor]
"""An inverse distribution function: quantile -> level."""


def uniform(options: ObjectiveConfig) -> None:
    """Return None: the level is the quantile itself."""


def logit_normal(options: ObjectiveConfig) -> Inverse:
    """Return the map under which ln(t / (1 - t)) is normally distributed."""

    def inverse(quantile: Tensor) -> Tensor:
        normal = torch.special.ndtri(quantile)
        return torch.special.expit(options.logit_mean + options.logit_std * normal)

    return inverse


def mode(options: ObjectiveConfig) -> Inverse:
    """Return t = 1 - u - scale (cos^2(pi u / 2) - 1 + u) with u = 1 - quantile.

    The map increases for scale <= 1.75."""

    def inverse(quantile: Tensor) -> Tensor:
        return quantile - options.mode_scale * (torch.sin(math.pi / 2 * quantile) ** 2 - quantile)

    return inverse


def cosmap(options: ObjectiveConfig) -> Inverse:
    """Return t = 1 - 1 / (tan(pi u / 2) + 1), whose log SNR is that of the cosine schedule."""

    def inverse(quantile: Tensor) -> Tensor:
        tangent = torch.tan(math.pi / 2 * quantile)
        return tangent / (tangent + 1)

    return inverse


def beta(options: ObjectiveConfig) -> Inverse:
    """Return the map under which t has the distribution beta(a, b)."""
    return Beta(options.beta_a, options.beta_b)


class Beta:
    """The inverse distribution function of beta(a, b), which torch does not have.

    It interpolates linearly between the logit of the quantile and logit(t), in a table that is
    computed once in fp64. For a, b in [0.1, 100] the error of t is below 1e-7."""

    def __init__(self, a: float, b: float):
        quantile_logits, level_logits = beta_table(a, b)
        self.quantile_logits = torch.from_numpy(quantile_logits)
        self.level_logits = torch.from_numpy(level_logits)

    def __call__(self, quantile: Tensor) -> Tensor:
        self._move_to(quantile.device)
        logit = torch.logit(quantile.double())
        right = torch.searchsorted(self.quantile_logits, logit)
        right = right.clamp(1, len(self.quantile_logits) - 1)
        left = right - 1
        x0 = self.quantile_logits[left]
        x1 = self.quantile_logits[right]
        y0 = self.level_logits[left]
        y1 = self.level_logits[right]
        return torch.special.expit(y0 + (logit - x0) / (x1 - x0) * (y1 - y0))

    def _move_to(self, device: torch.device) -> None:
        """Move the table to the device in the first step; later steps copy nothing."""
        if self.level_logits.device == device:
            return
        self.quantile_logits = self.quantile_logits.to(device)
        self.level_logits = self.level_logits.to(device)


def beta_table(a: float, b: float) -> tuple[np.ndarray, np.ndarray]:
    """Return logit(quantile) and logit(t) of beta(a, b), at even steps of logit(t).

    The first as a function of the second is smooth, and a straight line in both tails. The density
    of logit(t) is integrated by Simpson's rule, with a midpoint in each cell."""
    level_logits = np.linspace(-MAX_LOGIT, MAX_LOGIT, TABLE_SIZE)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    points = np.linspace(-MAX_LOGIT, MAX_LOGIT, 2 * TABLE_SIZE - 1)
    log_density = -a * np.logaddexp(0, -points) - b * np.logaddexp(0, points) - log_beta
    density = np.exp(log_density)
    step = level_logits[1] - level_logits[0]
    cells = (density[:-2:2] + 4 * density[1::2] + density[2::2]) * step / 6
    lower_tail = math.exp(-a * MAX_LOGIT - log_beta) / a
    upper_tail = math.exp(-b * MAX_LOGIT - log_beta) / b
    sums_from_below = np.cumsum(cells)
    sums_from_above = np.cumsum(cells[::-1])[::-1]
    mass_below = lower_tail + np.concatenate([[0], sums_from_below])
    mass_above = upper_tail + np.concatenate([sums_from_above, [0]])
    with np.errstate(divide="ignore"):
        quantile_logits = np.log(mass_below) - np.log(mass_above)
    is_finite = np.isfinite(quantile_logits)
    quantile_logits, first_index = np.unique(quantile_logits[is_finite], return_index=True)
    return quantile_logits, level_logits[is_finite][first_index]


def inverse_distribution(options: ObjectiveConfig) -> Inverse | None:
    """Return the inverse distribution function that `options` name, without truncation.

    None is the uniform distribution."""
    return get_function("densities", DENSITIES[options.timestep_sampling])(options)


class Density:
    """The distribution of noise levels in training: quantile (B,) -> level t (B,), in one dtype.

    It is truncated to --objective.timestep_range and to `t_range`, the levels that the denoiser is
    for. Only the quantiles whose levels are in both ranges are used. Raises ModelError if the
    ranges leave hardly any probability."""

    def __init__(self, options: ObjectiveConfig, t_range: tuple[float, float] = (0.0, 1.0)):
        self.inverse = inverse_distribution(options)
        low, high = options.timestep_range
        self.low = max(low, t_range[0])
        self.high = min(high, t_range[1])
        if self.low >= self.high:
            raise ModelError(
                f"--objective.timestep_range {low:g} {high:g}: this denoiser is for levels from "
                f"{t_range[0]:.3f} to {t_range[1]:.3f}. Use a range that overlaps"
            )
        self.first_quantile = self._quantile_of(self.low)
        last_quantile = self._quantile_of(self.high)
        self.mass = last_quantile - self.first_quantile
        if self.mass < MIN_MASS:
            raise ModelError(
                f"--objective.timestep_range {self.low:g} {self.high:g}: only {self.mass:.0e} of "
                f"the levels of --objective.timestep_sampling {options.timestep_sampling} are in "
                "this range. Use a wider range"
            )

    def _quantile_of(self, level: float) -> float:
        """Return the probability of levels below `level`, by bisection."""
        if self.inverse is None or level in (0, 1):
            return level
        low, high = 0.0, 1.0
        for _ in range(NUM_BISECTIONS):
            middle = (low + high) / 2
            level_at_middle = self.inverse(torch.tensor([middle], dtype=torch.float64)).item()
            if level_at_middle < level:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def __call__(self, quantile: Tensor) -> Tensor:
        quantile = quantile.clamp(EPS, 1 - EPS)
        if self.mass < 1:
            quantile = self.first_quantile + self.mass * quantile
        if self.inverse is None:
            level = quantile
        else:
            level = self.inverse(quantile.double())
            level = level.to(quantile.dtype)
        lowest = max(EPS, self.low)
        highest = min(1 - EPS, self.high)
        return level.clamp(lowest, highest)
