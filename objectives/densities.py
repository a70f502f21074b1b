"""How noise levels are distributed: maps from a uniform quantile to a level t, both in (0, 1), more
noise upward.

All are inverse distribution functions, so that even quantiles are as even a sample as there is.
logit-normal, mode and cosmap: Esser et al. 2024, "Scaling Rectified Flow Transformers" (arXiv
2403.03206), section 3.1.
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
"""The largest fp32 number below 1 is 1 - EPS: quantiles and levels stay between EPS and 1 - EPS."""
NODES = 2**15  # of the table of a beta distribution
EDGE = 17.5  # logit beyond which a level is clamped anyway
BISECTIONS = 60
LEAST_MASS = 1e-6


Inverse = Callable[[Tensor], Tensor]


def uniform(options: ObjectiveConfig) -> None:
    """t is uniform: the quantile itself."""


def logit_normal(options: ObjectiveConfig) -> Inverse:
    """ln(t / (1 - t)) is normal."""
    return lambda quantile: torch.special.expit(
        options.logit_mean + options.logit_std * torch.special.ndtri(quantile)
    )


def mode(options: ObjectiveConfig) -> Inverse:
    """The paper's t = 1 - u - scale (cos^2(pi u / 2) - 1 + u) with u = 1 - quantile; it increases
    for scale <= 1.75."""

    def inverse(quantile: Tensor) -> Tensor:
        return quantile - options.mode_scale * (torch.sin(math.pi / 2 * quantile) ** 2 - quantile)

    return inverse


def cosmap(options: ObjectiveConfig) -> Inverse:
    """t = 1 - 1 / (tan(pi u / 2) + 1), whose log SNR is that of the cosine schedule."""

    def inverse(quantile: Tensor) -> Tensor:
        tangent = torch.tan(math.pi / 2 * quantile)
        return tangent / (tangent + 1)

    return inverse


def beta(options: ObjectiveConfig) -> Inverse:
    """t has the distribution beta(a, b)."""
    return Beta(options.beta_a, options.beta_b)


class Beta:
    """The inverse distribution function of beta(a, b), which torch does not have, from a table made
    once in fp64.

    The table holds logit(t) at 2^15 even steps against the logit of the distribution function there: a smooth curve
    that is a straight line in both tails, interpolated linearly. For a, b in [0.1, 100] t is off by less than 1e-7.
    """

    def __init__(self, a: float, b: float):
        y = np.linspace(-EDGE, EDGE, NODES)
        log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        # density of y = logit(t), at the nodes and midway (Simpson's rule)
        fine = np.linspace(-EDGE, EDGE, 2 * NODES - 1)
        density = np.exp(-a * np.logaddexp(0, -fine) - b * np.logaddexp(0, fine) - log_beta)
        cells = (density[:-2:2] + 4 * density[1::2] + density[2::2]) * (y[1] - y[0]) / 6
        tails = math.exp(-a * EDGE - log_beta) / a, math.exp(-b * EDGE - log_beta) / b
        below = tails[0] + np.concatenate([[0], np.cumsum(cells)])
        above = tails[1] + np.concatenate([np.cumsum(cells[::-1])[::-1], [0]])
        with np.errstate(divide="ignore"):
            logit = np.log(below) - np.log(above)
        finite = np.isfinite(logit)
        logit, first = np.unique(logit[finite], return_index=True)
        self.logit, self.y = torch.from_numpy(logit), torch.from_numpy(y[finite][first])

    def __call__(self, quantile: Tensor) -> Tensor:
        if self.y.device != quantile.device:
            self.logit, self.y = self.logit.to(quantile.device), self.y.to(quantile.device)  # once
        asked = torch.logit(quantile.double())
        i = torch.searchsorted(self.logit, asked).clamp(1, len(self.y) - 1)
        left, right = self.logit[i - 1], self.logit[i]
        y = self.y[i - 1] + (asked - left) / (right - left) * (self.y[i] - self.y[i - 1])
        return torch.special.expit(y)


def inverse_distribution(options: ObjectiveConfig) -> Inverse | None:
    """Return the inverse distribution function that `options` name, without truncation; None for
    uniform."""
    return get_function("densities", DENSITIES[options.timestep_sampling])(options)


class Density:
    """Quantile (B,) -> level t (B,), in the quantile's dtype, inside (0, 1), `timestep_range` and
    `span`.

    The range cuts the density off: it uses those quantiles whose levels lie in it. Raises ModelError if hardly any do.
    `span`: the levels that the denoiser is for.
    """

    def __init__(self, options: ObjectiveConfig, span: tuple[float, float] = (0.0, 1.0)):
        self.inverse = inverse_distribution(options)
        self.low, self.high = (
            max(options.timestep_range[0], span[0]),
            min(options.timestep_range[1], span[1]),
        )
        if self.low >= self.high:
            low, high = options.timestep_range
            raise ModelError(
                f"--objective.timestep_range = {low:g} {high:g}: this denoiser is for levels from {span[0]:.3f} to "
                f"{span[1]:.3f}"
            )
        ends = [self._quantile_of(level) for level in (self.low, self.high)]
        self.first, self.mass = ends[0], ends[1] - ends[0]
        if self.mass < LEAST_MASS:
            raise ModelError(
                f"--objective.timestep_range = {self.low:g} {self.high:g}: only a share of "
                f"{self.mass:.0e} of the levels of {options.timestep_sampling} is in this range"
            )

    def _quantile_of(self, level: float) -> float:
        """The share of levels below `level`, by bisection."""
        if self.inverse is None or level in (0, 1):
            return level
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            below = self.inverse(torch.tensor([middle], dtype=torch.float64)).item() < level
            low, high = (middle, high) if below else (low, middle)
        return (low + high) / 2

    def __call__(self, quantile: Tensor) -> Tensor:
        quantile = quantile.clamp(EPS, 1 - EPS)
        if self.mass < 1:
            quantile = self.first + self.mass * quantile
        level = (
            quantile if self.inverse is None else self.inverse(quantile.double()).to(quantile.dtype)
        )
        return level.clamp(max(EPS, self.low), min(1 - EPS, self.high))
