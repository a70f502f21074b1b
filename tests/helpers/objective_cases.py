"""Noise processes of every kind, as diffusers' schedulers say them, and what tests of objectives share."""

from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from helpers.project import BASE
from objectives.config import ObjectiveConfig
from objectives.objective import Objective
from objectives.processes import NoiseProcess
from objectives.schedulers import process_from_scheduler

SHAPE = (5, 4, 6, 7)
QUANTILES = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.9995])
TOKENS = 1024
DYNAMIC = {"use_dynamic_shifting": True}
V, ZERO_SNR = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}
# name -> diffusers' class, what its config has, the options
PROCESSES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "epsilon": (DDPMScheduler, {}, {}),
    "v": (DDPMScheduler, V, {}),
    "v, zero terminal SNR": (DDPMScheduler, {**V, **ZERO_SNR}, {}),
    "v, zero terminal SNR asked for": (DDPMScheduler, V, {"zero_terminal_snr": True}),
    "epsilon, continuous": (DDPMScheduler, {}, {"continuous_timesteps": True}),
    "v, zero terminal SNR, continuous": (
        DDPMScheduler,
        {**V, **ZERO_SNR},
        {"continuous_timesteps": True},
    ),
    "flow": (FlowMatchEulerDiscreteScheduler, {}, {}),
    "flow, shift 3": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, {}),
    "flow, shift asked for": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, {"shift": 0.5}),
    "flow, dynamic": (FlowMatchEulerDiscreteScheduler, DYNAMIC, {}),
    "flow, dynamic, linear": (
        FlowMatchEulerDiscreteScheduler,
        {**DYNAMIC, "time_shift_type": "linear"},
        {},
    ),
    "EDM": (EDMEulerScheduler, {}, {}),
    "EDM, v": (EDMDPMSolverMultistepScheduler, {**V, "sigma_data": 1.0}, {"edm_mean": 0.4}),
}


def sd_schedule(kind: Any, changes: dict[str, Any]) -> Any:
    """The scheduler; a DDPM one has the betas of the embedded base."""
    if kind is DDPMScheduler:
        return kind.from_pretrained(BASE, subfolder="scheduler", **changes)
    return kind(**changes)


def config_of(scheduler: Any) -> dict[str, Any]:
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def process_of(name: str, **options: Any) -> NoiseProcess:
    kind, changes, own = PROCESSES[name]
    return process_from_scheduler(
        config_of(sd_schedule(kind, changes)), ObjectiveConfig(**{**own, **options})
    )


def objective_of(name: str, **options: Any) -> Objective:
    """The process of that name in an objective with further `options`, which the process has no use for."""
    return Objective(process_of(name), ObjectiveConfig(**options))


def normal(seed: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def even(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Quantiles in the middle of `count` equal parts of (0, 1)."""
    return (torch.arange(count, dtype=dtype) + 0.5) / count
