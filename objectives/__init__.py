"""The objective of training: timestep sampling, target, loss and loss weighting.

The registries below name the functions of this package. Importing this module imports no torch, so
that options can be checked at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class LossEntry:
    """A loss function of objectives/losses.py."""

    function: str
    delta_power: int | None = None
    """Losses with a delta: with delta d the loss is d^delta_power times the loss of the error / d.
    """


LOSSES: dict[str, LossEntry] = {
    "MSE": LossEntry("mse"),
    "L1": LossEntry("l1"),
    "Huber": LossEntry("huber", delta_power=2),
    "SmoothL1": LossEntry("smooth_l1", delta_power=1),
    "pseudo-Huber": LossEntry("pseudo_huber", delta_power=2),
    "log-cosh": LossEntry("log_cosh"),
}
"""`--loss_function` -> its function. To add a loss, write the function and add a line here."""

DENSITIES: dict[str, str] = {
    "uniform": "uniform",
    "logit-normal": "logit_normal",
    "mode": "mode",
    "cosmap": "cosmap",
    "beta": "beta",
}
"""`--objective.timestep_sampling` -> the function in objectives/densities.py that makes its inverse
distribution."""

WEIGHTINGS: dict[str, str | None] = {
    "none": None,
    "min-snr": "min_snr",
    "debiased": "debiased",
    "p2": "p2",
    "sigma2": "sigma2",
    "inverse-sigma2": "inverse_sigma2",
    "cosmap": "cosmap",
}
"""`--objective.loss_weighting` -> its function in objectives/weightings.py; none has no function.
"""


def get_function(module: str, name: str) -> Callable[..., Any]:
    """Return the function `name` of the module objectives.`module`."""
    return getattr(import_module(f"objectives.{module}"), name)
