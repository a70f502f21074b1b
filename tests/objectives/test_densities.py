"""Densities of the noise level: inverse distribution functions, against their formulas and each other."""

import math
from typing import Any

import pytest
import torch
from helpers.objective_cases import PROCESSES, TOKENS, even, process_of
from torch import Tensor

from common.errors import ModelError
from objectives.config import ObjectiveConfig
from objectives.densities import EPS, Beta, Density

NORMAL = torch.distributions.Normal(0, 1)


def logit_normal_cdf(t: Tensor, mean: float, std: float) -> Tensor:
    return NORMAL.cdf((t.logit() - mean) / std)


# name -> options, distribution function of t (None: has no closed form)
DENSITIES: dict[str, tuple[dict[str, Any], Any]] = {
    "uniform": ({}, lambda t: t),
    "logit-normal": ({"timestep_sampling": "logit-normal"}, lambda t: logit_normal_cdf(t, 0, 1)),
    "logit-normal, shifted": (
        {"timestep_sampling": "logit-normal", "logit_mean": 0.8, "logit_std": 0.5},
        lambda t: logit_normal_cdf(t, 0.8, 0.5),
    ),
    "mode": ({"timestep_sampling": "mode"}, None),
    "mode, steepest": ({"timestep_sampling": "mode", "mode_scale": 1.75}, None),
    "mode, ends": ({"timestep_sampling": "mode", "mode_scale": -1}, None),
    "cosmap": ({"timestep_sampling": "cosmap"}, lambda t: 2 / math.pi * torch.atan(t / (1 - t))),
    "beta(2, 2)": ({"timestep_sampling": "beta"}, lambda t: 3 * t**2 - 2 * t**3),
    "beta(1, 4)": ({"timestep_sampling": "beta", "beta_a": 1, "beta_b": 4}, lambda t: 1 - (1 - t) ** 4),
    "beta(0.3, 1)": ({"timestep_sampling": "beta", "beta_a": 0.3, "beta_b": 1}, lambda t: t**0.3),
    "beta(5, 1)": ({"timestep_sampling": "beta", "beta_a": 5, "beta_b": 1}, lambda t: t**5),
    "beta(0.5, 0.5)": (
        {"timestep_sampling": "beta", "beta_a": 0.5, "beta_b": 0.5}, lambda t: 2 / math.pi * torch.asin(t.sqrt())
    ),
}  # fmt: skip
RANGES = [(0.0, 1.0), (0.2, 0.6), (0.9, 1.0)]


def density(name: str, **more: Any) -> Density:
    return Density(ObjectiveConfig(**{**DENSITIES[name][0], **more}))


@pytest.mark.parametrize("timestep_range", RANGES)
@pytest.mark.parametrize("name", DENSITIES)
def test_levels_rise_with_the_quantile_inside_the_range(name, timestep_range):
    drawn = density(name, timestep_range=timestep_range)
    low, high = timestep_range
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([0, 2**-24, 1e-6, 1 - 1e-6, 1 - 2**-24, 1], dtype=dtype)
        levels = drawn(torch.cat([ends[:3], even(10000, dtype), ends[3:]]))
        assert levels.dtype == dtype
        assert (levels.diff() >= 0).all()
        assert (levels >= max(low, EPS)).all()
        assert (levels <= min(high, 1 - EPS)).all()
        if timestep_range != (0.0, 1.0):  # and all of it is used
            assert levels[0] < low + 0.02
            assert levels[-1] > high - 0.02


@pytest.mark.parametrize("timestep_range", RANGES)
@pytest.mark.parametrize("name", [name for name in DENSITIES if DENSITIES[name][1]])
def test_each_is_the_inverse_of_its_distribution_function(name, timestep_range):
    cdf, quantile = DENSITIES[name][1], even(5001, torch.float64)
    levels = density(name, timestep_range=timestep_range)(quantile)
    first, last = (
        cdf(torch.tensor(end, dtype=torch.float64).clamp(1e-300, 1 - 1e-16))
        for end in timestep_range
    )
    inside = (levels > EPS) & (levels < 1 - EPS)
    assert inside.float().mean() > 0.99
    found = (cdf(levels) - first) / (last - first)
    torch.testing.assert_close(found[inside], quantile[inside], rtol=0, atol=5e-7)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.29, 1.75])
def test_mode_is_the_papers_map_as_in_diffusers(scale):
    u = even(1000, torch.float64)
    paper = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    torch.testing.assert_close(density("mode", mode_scale=scale)(1 - u), paper)


@pytest.mark.parametrize(
    ("a", "b"),
    [(a, b) for a in (0.1, 0.5, 1, 3, 30, 100) for b in (0.1, 1, 2.5, 100) if (a, b) != (100, 0.1)],
)
def test_moments_of_beta(a, b):
    levels = Beta(a, b)(even(400000, torch.float64))
    mean, variance = a / (a + b), a * b / (a + b) ** 2 / (a + b + 1)
    assert math.isclose(levels.mean(), mean, abs_tol=1e-5)
    assert math.isclose(levels.var(), variance, rel_tol=1e-2)
    mirrored = 1 - Beta(b, a)(1 - even(400000, torch.float64))
    torch.testing.assert_close(levels, mirrored, rtol=0, atol=1e-7)


@pytest.mark.parametrize("a", [0.1, 0.3, 1, 2, 7, 40, 100])
def test_the_error_of_beta_is_as_documented(a):
    edge = torch.logspace(-7.2, -1, 2000, dtype=torch.float64)
    quantile = torch.cat([edge, even(20000, torch.float64), 1 - edge])
    torch.testing.assert_close(Beta(a, 1)(quantile), quantile ** (1 / a), rtol=0, atol=1e-7)
    torch.testing.assert_close(
        Beta(1, a)(quantile), 1 - (1 - quantile) ** (1 / a), rtol=0, atol=1e-7
    )


def test_moments_of_logit_normal():
    logits = density("logit-normal, shifted")(even(200000, torch.float64)).logit()
    assert math.isclose(logits.mean(), 0.8, abs_tol=1e-3)
    assert math.isclose(logits.std(), 0.5, abs_tol=1e-3)


@pytest.mark.parametrize("timestep_range", RANGES)
@pytest.mark.parametrize("drawn", DENSITIES)
@pytest.mark.parametrize("process", PROCESSES)
def test_every_density_goes_with_every_process(process, drawn, timestep_range):
    levels_of, quantile = density(drawn, timestep_range=timestep_range), even(500)
    made = process_of(process)
    levels = made.levels(levels_of(quantile), TOKENS)
    lowest, highest = (
        made.levels(torch.tensor([end]).clamp(EPS, 1 - EPS), TOKENS) for end in timestep_range
    )
    assert (levels.flow_sigma.diff() >= 0).all()
    assert levels.to_x0.isfinite().all()
    assert (levels.flow_sigma >= lowest.flow_sigma * (1 - 1e-5)).all()
    assert (levels.flow_sigma <= highest.flow_sigma * (1 + 1e-5)).all()


def test_uniform_without_a_range_leaves_quantiles_as_they_are():
    quantile = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert density("uniform")(quantile).equal(quantile)


def test_a_range_in_which_there_is_nothing_is_refused():
    with pytest.raises(ModelError, match=r"--objective\.timestep_range 0\.99 1: only"):
        density("logit-normal", logit_mean=-8.0, timestep_range=(0.99, 1.0))
