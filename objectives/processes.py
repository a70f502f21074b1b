"""Noise processes: from a level of noise to what is mixed for the denoiser and what it should
answer.

Everything about a level follows from four numbers: noisy = signal x0 + sigma noise, and target =
target_signal x0 + target_sigma noise.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from common.errors import ModelError
from objectives.config import ObjectiveConfig, changed_options
from objectives.densities import EPS
from objectives.scheduler_keys import ZERO_SNR

PREDICTION_TYPES = ("epsilon", "v_prediction")
LEAST_ALPHA = 4.8973451890853435e-08  # ComfyUI's in place of 0 (model_sampling.rescale_zero_terminal_snr_sigmas)


@dataclass(frozen=True)
class Levels:
    """The noise levels of a batch, (B,) each; `timestep` as diffusers' scheduler hands it to its
    pipeline's loop."""

    signal: Tensor
    sigma: Tensor
    target_signal: Tensor
    target_sigma: Tensor
    timestep: Tensor

    @property
    def to_x0(self) -> Tensor:
        """The size of the error in x0, read off noisy and prediction, per error in the prediction."""
        return (
            self.sigma / (self.signal * self.target_sigma - self.sigma * self.target_signal).abs()
        )

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio."""
        return (self.signal / self.sigma) ** 2

    @property
    def share(self) -> Tensor:
        """sigma / (signal + sigma): the sigma that flow matching has at this signal-to-noise ratio."""
        return self.sigma / (self.signal + self.sigma)


class NoiseProcess(ABC):
    """A family of noise levels and what the denoiser predicts in it."""

    name: str
    prediction_type: str
    heeds: tuple[str, ...]
    """Options of the config that say something to this process, among those that not every process
    has."""
    span: tuple[float, float] = (0.0, 1.0)
    """The quantiles that the denoiser is for, if others are for the rest; none outside are trained
    or validated on."""

    def describe(self) -> str:
        """It in words, for the summary of a run."""
        return f"{self.name}, {self.prediction_type}"

    @abstractmethod
    def levels(self, quantile: Tensor, tokens: int) -> Levels:
        """The levels at `quantile` (B,) in (0, 1), monotone: 0 clean, 1 pure noise. In the
        quantile's dtype.

        `tokens`: image tokens of the denoiser, for processes that depend on the image's size."""

    def time(self, levels: Levels) -> Tensor:
        """(B,) the level on the process's own scale from 0 (clean) to 1 (noise)."""
        return levels.share


def checked(prediction_type: str) -> str:
    """`prediction_type`; ValueError if it is not known."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type {prediction_type!r}: only {' and '.join(PREDICTION_TYPES)} are known"
        )
    return prediction_type


class DDPM(NoiseProcess):
    """Variance-preserving diffusion: signal = sqrt(a), sigma = sqrt(1 - a), with a =
    alphas_cumprod[timestep].

    Target `epsilon` is the noise, `v_prediction` is sqrt(a) noise - sqrt(1 - a) x0 (Salimans & Ho 2022, appendix D).
    The quantile picks the timestep evenly. `continuous`: it picks t = quantile (N - 1), between timesteps the logarithm
    of sigma / signal is interpolated, and the denoiser is given the nearest timestep (ComfyUI's ModelSamplingDiscrete).
    """

    name = "DDPM"
    heeds = ("prediction_type", "zero_terminal_snr", "continuous_timesteps")

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str, continuous: bool = False):
        self.prediction_type, self.continuous = checked(prediction_type), continuous
        self.zero_terminal_snr = bool(alphas_cumprod.min() <= 0)
        if prediction_type == "epsilon" and self.zero_terminal_snr:
            raise ModelError(
                "--objective.zero_terminal_snr, or the model's scheduler, asks for epsilon at zero terminal SNR, where "
                "the noise is all there is to see and says nothing of the image. Such a model predicts v "
                "(--objective.prediction_type v_prediction)"
            )
        wide = alphas_cumprod.double().clamp(min=LEAST_ALPHA)
        self.alphas_cumprod, self.log_ratio = (
            alphas_cumprod.float(),
            ((1 - wide) / wide).sqrt().log(),
        )

    def describe(self) -> str:
        return super().describe() + (", zero terminal SNR" if self.zero_terminal_snr else "")

    def levels(self, quantile: Tensor, tokens: int) -> Levels:
        if self.alphas_cumprod.device != quantile.device:  # once: later steps copy nothing
            self.alphas_cumprod = self.alphas_cumprod.to(quantile.device)
            self.log_ratio = self.log_ratio.to(quantile.device)
        timestep, signal, sigma = (self._between if self.continuous else self._at)(quantile)
        if self.prediction_type == "epsilon":
            return Levels(
                signal, sigma, torch.zeros_like(signal), torch.ones_like(signal), timestep
            )
        return Levels(signal, sigma, -sigma, signal, timestep)

    def _at(self, quantile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = len(self.alphas_cumprod)
        timestep = (quantile * count).long().clamp(0, count - 1)
        alpha_cumprod = self.alphas_cumprod[timestep].to(quantile.dtype)
        return timestep, alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()

    def _between(self, quantile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = quantile.double() * (len(self.log_ratio) - 1)
        ratio = torch.lerp(
            self.log_ratio[t.floor().long()], self.log_ratio[t.ceil().long()], t.frac()
        ).exp()
        root = (ratio**2 + 1).sqrt()
        return (
            (t - 0.5).ceil().long(),
            (1 / root).to(quantile.dtype),
            (ratio / root).to(quantile.dtype),
        )

    def time(self, levels: Levels) -> Tensor:
        return levels.timestep.to(levels.sigma.dtype) / len(self.alphas_cumprod)


@dataclass(frozen=True)
class Shift:
    """The factor a of sigma = a t / (1 + (a - 1) t): a constant, or by the number of image tokens.

    Then mu is a line through `low` and `high`, each (tokens, mu), and a is mu or, if `exponential`,
    e^mu.
    """

    constant: float = 1.0
    low: tuple[int, float] = (256, 0.5)
    high: tuple[int, float] = (4096, 1.15)
    dynamic: bool = False
    exponential: bool = True

    def __call__(self, tokens: int) -> float:
        if not self.dynamic:
            return self.constant
        slope = (self.high[1] - self.low[1]) / (self.high[0] - self.low[0])
        mu = tokens * slope + (self.low[1] - slope * self.low[0])
        return math.exp(mu) if self.exponential else mu


class Flow(NoiseProcess):
    """Flow matching: signal = 1 - sigma, target noise - x0 (Lipman et al. 2023; rectified flow, Liu
    et al. 2023).

    The quantile is t before the shift (Esser et al. 2024, section 5.3.2). `inverted`: the timestep counts from noise to
    image, as Mochi's does.
    """

    name = "flow matching"
    prediction_type = "velocity"
    heeds = ("shift",)

    def __init__(
        self, shift: Callable[[int], float], num_train_timesteps: int = 1000, inverted: bool = False
    ):
        self.shift, self.num_train_timesteps, self.inverted = shift, num_train_timesteps, inverted

    def quantile(self, sigma: float, tokens: int) -> float:
        """Where that level is."""
        factor = self.shift(tokens)
        return sigma / (factor - (factor - 1) * sigma)

    def levels(self, quantile: Tensor, tokens: int) -> Levels:
        factor = self.shift(tokens)
        sigma = (factor * quantile / (1 + (factor - 1) * quantile)).clamp(max=1 - EPS)
        one = torch.ones_like(sigma)
        timestep = (1 - sigma if self.inverted else sigma) * self.num_train_timesteps
        return Levels(1 - sigma, sigma, -one, one, timestep)


class EDM(NoiseProcess):
    """Karras et al. 2022 (arXiv 2206.00364), table 1: ln sigma normal, the denoised latents c_skip
    x + c_out F(c_in x).

    `noisy` is what the network sees, c_in (x0 + sigma noise), and the target is that of F; the timestep is c_noise =
    ln(sigma) / 4. diffusers calls a network with positive c_out epsilon, with negative c_out v_prediction.
    """

    name = "EDM"
    heeds = ("prediction_type", "edm_mean", "edm_std")

    def __init__(
        self, prediction_type: str, sigma_data: float = 0.5, mean: float = -1.2, std: float = 1.2
    ):
        self.prediction_type, self.sigma_data = checked(prediction_type), sigma_data
        self.mean, self.std = mean, std

    def levels(self, quantile: Tensor, tokens: int) -> Levels:
        log_sigma = self.mean + self.std * torch.special.ndtri(quantile)
        sigma, data = log_sigma.exp(), self.sigma_data
        c_in = 1 / (sigma**2 + data**2).sqrt()
        sign = 1 if self.prediction_type == "epsilon" else -1
        # F = ((1 - c_skip) x0 - c_skip sigma noise) / c_out
        return Levels(
            c_in, c_in * sigma, sign * sigma * c_in / data, -sign * data * c_in, log_sigma / 4
        )


def process_from_scheduler(config: Mapping[str, Any], options: ObjectiveConfig) -> NoiseProcess:
    """The noise process of a model, from the config of its diffusers scheduler and the options.

    `config` has the scheduler's `_class_name`. Raises ValueError for a scheduler that no process here is, ModelError
    for options that this process has no use for.
    """
    name, prediction = str(config.get("_class_name", "")), config.get("prediction_type", "epsilon")
    chosen = prediction if options.prediction_type == "auto" else options.prediction_type
    kind: type[NoiseProcess] = DDPM
    if name.startswith("EDM"):
        kind = EDM
    elif (
        name.startswith("FlowMatch")
        or config.get("use_flow_sigmas")
        or prediction == "flow_prediction"
    ):
        kind = Flow
    own = {option for process in (DDPM, Flow, EDM) for option in process.heeds} - set(kind.heeds)
    faults = [
        f"--objective.{option} = {getattr(options, option)}"
        for option in changed_options(options, sorted(own))
    ]
    if faults:
        raise ModelError(
            "\n  ".join([f"this model's noise process, {kind.name}, has no use for", *faults])
        )
    if kind is EDM:
        return EDM(chosen, config.get("sigma_data", 0.5), options.edm_mean, options.edm_std)
    if kind is Flow:
        count, inverted = (
            config.get("num_train_timesteps", 1000),
            config.get("invert_sigmas", False),
        )
        return Flow(shift_of(config, options), count, inverted)
    changes = ZERO_SNR if options.zero_terminal_snr else {}
    scheduler = DDPMScheduler.from_config(dict(config), **changes)
    # between timesteps ComfyUI's accuracy is wanted, which multiplies them up in fp64
    wide = (1 - scheduler.betas.double()).cumprod(0)
    return DDPM(
        wide if options.continuous_timesteps else scheduler.alphas_cumprod,
        chosen,
        options.continuous_timesteps,
    )


def sampler_of(config: Mapping[str, Any]) -> Any:
    """diffusers' scheduler of that config, which has its `_class_name`; DDIM's for one that has no zero terminal SNR
    where it is asked for."""
    kind = getattr(diffusers, config["_class_name"])
    asked = config.get("rescale_betas_zero_snr")
    if asked and "rescale_betas_zero_snr" not in signature(kind.__init__).parameters:
        kind = DDIMScheduler
    return kind.from_config(dict(config))


def sample_as_trained(pipeline: Any, options: ObjectiveConfig) -> Any:
    """diffusers' pipeline with a scheduler that says of the base what the options say, where its
    own does not."""
    changes: dict[str, Any] = {}
    if options.prediction_type != "auto":
        changes["prediction_type"] = options.prediction_type
    if options.zero_terminal_snr:
        changes |= ZERO_SNR
    if changes:
        own = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
        pipeline.scheduler = sampler_of({**own, **changes})
    return pipeline


def shift_of(config: Mapping[str, Any], options: ObjectiveConfig) -> Shift:
    """The shift that a flow-matching scheduler's config asks for, with diffusers' defaults, or the
    option's."""
    if options.shift is not None:
        return Shift(options.shift)
    if config.get("use_flow_sigmas") or "flow_shift" in config:
        return Shift(config.get("flow_shift", 1.0))
    return Shift(
        config.get("shift", 1.0),
        (config.get("base_image_seq_len", 256), config.get("base_shift", 0.5)),
        (config.get("max_image_seq_len", 4096), config.get("max_shift", 1.15)),
        config.get("use_dynamic_shifting", False),
        config.get("time_shift_type", "exponential") == "exponential",
    )
