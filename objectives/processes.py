"""Noise processes: the denoiser's input and target at each noise level t in (0, 1).

Four numbers describe a noise level: noisy = signal x0 + sigma noise, and target = target_signal x0
+ target_sigma noise. objectives/schedulers.py makes a process from a diffusers scheduler.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ModelError
from objectives.densities import EPS

PREDICTION_TYPES = ("epsilon", "v_prediction")
MIN_ALPHA = 4.8973451890853435e-08
"""ComfyUI's alphas_cumprod instead of 0 (model_sampling.rescale_zero_terminal_snr_sigmas)."""


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels of a batch, (B,) each.

    `timestep`: as diffusers' scheduler gives it to its pipeline's loop."""

    signal: Tensor
    sigma: Tensor
    target_signal: Tensor
    target_sigma: Tensor
    timestep: Tensor

    @property
    def to_x0(self) -> Tensor:
        """The error in x0 per error in the prediction, if x0 is computed from noisy and it."""
        determinant = self.signal * self.target_sigma - self.sigma * self.target_signal
        return self.sigma / determinant.abs()

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio."""
        return (self.signal / self.sigma) ** 2

    @property
    def flow_sigma(self) -> Tensor:
        """sigma / (signal + sigma): flow matching's sigma at the same signal-to-noise ratio."""
        return self.sigma / (self.signal + self.sigma)


class NoiseProcess(ABC):
    """Noise levels of a kind of model, and the prediction that its denoiser makes."""

    name: str
    prediction_type: str
    supported_options: tuple[str, ...]
    """Options of the config that this process supports, of those that not every process does."""
    t_range: tuple[float, float] = (0.0, 1.0)
    """The t that the denoiser is for. Training and validation use no others."""

    def describe(self) -> str:
        """Return a description for the summary of a run."""
        return f"{self.name}, {self.prediction_type}"

    @abstractmethod
    def levels(self, t: Tensor, tokens: int) -> NoiseLevels:
        """Return the levels at t (B,) in (0, 1), in the dtype of t: 0 is clean, 1 is pure noise.

        `tokens`: image tokens of the denoiser, for processes that depend on the image's size."""

    def relative_timestep(self, levels: NoiseLevels) -> Tensor:
        """Return (B,) the level on the process's own scale from 0 (clean) to 1 (noise)."""
        return levels.flow_sigma


def check_prediction_type(prediction_type: str) -> str:
    """Return the prediction type. Raises ValueError if it is not supported."""
    if prediction_type not in PREDICTION_TYPES:
        supported = " and ".join(PREDICTION_TYPES)
        raise ValueError(f"prediction_type {prediction_type!r}: only {supported} are supported")
    return prediction_type


class DDPM(NoiseProcess):
    """Variance-preserving diffusion, with a = alphas_cumprod[timestep].

    signal = sqrt(a) and sigma = sqrt(1 - a). The target `epsilon` is the noise, `v_prediction` is
    sqrt(a) noise - sqrt(1 - a) x0 (Salimans & Ho 2022, appendix D). t selects each timestep with
    the same probability. `continuous`: the timestep is t (N - 1), the logarithm of sigma / signal
    is interpolated between timesteps, and the denoiser gets the nearest timestep (ComfyUI's
    ModelSamplingDiscrete)."""

    name = "DDPM"
    supported_options = ("prediction_type", "zero_terminal_snr", "continuous_timesteps")

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str, continuous: bool = False):
        self.prediction_type = check_prediction_type(prediction_type)
        self.continuous = continuous
        self.zero_terminal_snr = bool(alphas_cumprod.min() <= 0)
        if prediction_type == "epsilon" and self.zero_terminal_snr:
            raise ModelError(
                "--objective.zero_terminal_snr (or the model's scheduler): a model that predicts "
                "epsilon cannot be trained at zero terminal SNR, where the input is pure noise and "
                "the answer says nothing about the image. Such models predict v: use "
                "--objective.prediction_type v_prediction"
            )
        self.alphas_cumprod = alphas_cumprod.float()
        alpha = alphas_cumprod.double().clamp(min=MIN_ALPHA)
        self.log_ratio = ((1 - alpha) / alpha).sqrt().log()

    def describe(self) -> str:
        suffix = ", zero terminal SNR" if self.zero_terminal_snr else ""
        return super().describe() + suffix

    def levels(self, t: Tensor, tokens: int) -> NoiseLevels:
        self._move_to(t.device)
        if self.continuous:
            timestep, signal, sigma = self._between_timesteps(t)
        else:
            timestep, signal, sigma = self._at_timesteps(t)
        if self.prediction_type == "epsilon":
            target_signal = torch.zeros_like(signal)
            target_sigma = torch.ones_like(signal)
        else:
            target_signal = -sigma
            target_sigma = signal
        return NoiseLevels(signal, sigma, target_signal, target_sigma, timestep)

    def _move_to(self, device: torch.device) -> None:
        """Move the tables to the device in the first step; later steps copy nothing."""
        if self.alphas_cumprod.device == device:
            return
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        self.log_ratio = self.log_ratio.to(device)

    def _at_timesteps(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return timestep, signal and sigma.

        All timesteps are equally frequent for a uniform t."""
        count = len(self.alphas_cumprod)
        timestep = (t * count).long().clamp(0, count - 1)
        alpha = self.alphas_cumprod[timestep].to(t.dtype)
        return timestep, alpha.sqrt(), (1 - alpha).sqrt()

    def _between_timesteps(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nearest timestep, signal and sigma."""
        position = t.double() * (len(self.log_ratio) - 1)
        low = self.log_ratio[position.floor().long()]
        high = self.log_ratio[position.ceil().long()]
        ratio = torch.lerp(low, high, position.frac()).exp()
        root = (ratio**2 + 1).sqrt()
        signal = 1 / root
        sigma = ratio / root
        timestep = (position - 0.5).ceil().long()
        return timestep, signal.to(t.dtype), sigma.to(t.dtype)

    def relative_timestep(self, levels: NoiseLevels) -> Tensor:
        return levels.timestep.to(levels.sigma.dtype) / len(self.alphas_cumprod)


@dataclass(frozen=True)
class Shift:
    """The factor a of sigma = a t / (1 + (a - 1) t): a constant, or by the number of image tokens.

    If `dynamic`, mu is a line through `low` and `high`, each (tokens, mu). The factor is mu or, if
    `exponential`, e^mu."""

    constant: float = 1.0
    low: tuple[int, float] = (256, 0.5)
    high: tuple[int, float] = (4096, 1.15)
    dynamic: bool = False
    exponential: bool = True

    def __call__(self, tokens: int) -> float:
        if not self.dynamic:
            return self.constant
        low_tokens, low_mu = self.low
        high_tokens, high_mu = self.high
        slope = (high_mu - low_mu) / (high_tokens - low_tokens)
        mu = tokens * slope + (low_mu - slope * low_tokens)
        return math.exp(mu) if self.exponential else mu


class Flow(NoiseProcess):
    """Flow matching: signal = 1 - sigma, target = noise - x0.

    (Lipman et al. 2023; rectified flow, Liu et al. 2023.) t is the level before the shift (Esser
    et al. 2024, section 5.3.2). `inverted`: the timestep counts from noise to image, as Mochi's
    does."""

    name = "flow matching"
    prediction_type = "velocity"
    supported_options = ("shift",)

    def __init__(
        self, shift: Callable[[int], float], num_train_timesteps: int = 1000, inverted: bool = False
    ):
        self.shift = shift
        self.num_train_timesteps = num_train_timesteps
        self.inverted = inverted

    def t_of_sigma(self, sigma: float, tokens: int) -> float:
        """Return the t at which the level is `sigma`."""
        factor = self.shift(tokens)
        return sigma / (factor - (factor - 1) * sigma)

    def levels(self, t: Tensor, tokens: int) -> NoiseLevels:
        factor = self.shift(tokens)
        sigma = (factor * t / (1 + (factor - 1) * t)).clamp(max=1 - EPS)
        signal = 1 - sigma
        target_sigma = torch.ones_like(sigma)
        relative_timestep = signal if self.inverted else sigma
        return NoiseLevels(
            signal=signal,
            sigma=sigma,
            target_signal=-target_sigma,
            target_sigma=target_sigma,
            timestep=relative_timestep * self.num_train_timesteps,
        )


class EDM(NoiseProcess):
    """Karras et al. 2022 (arXiv 2206.00364), table 1, with ln sigma normally distributed.

    The denoised latents are c_skip x + c_out F(c_in x). `noisy` is the network's input, c_in (x0 +
    sigma noise), and the target is that of F. The timestep is c_noise = ln(sigma) / 4. diffusers
    calls a network with positive c_out epsilon, and one with negative c_out v_prediction."""

    name = "EDM"
    supported_options = ("prediction_type", "edm_mean", "edm_std")

    def __init__(
        self, prediction_type: str, sigma_data: float = 0.5, mean: float = -1.2, std: float = 1.2
    ):
        self.prediction_type = check_prediction_type(prediction_type)
        self.sigma_data = sigma_data
        self.mean, self.std = mean, std

    def levels(self, t: Tensor, tokens: int) -> NoiseLevels:
        log_sigma = self.mean + self.std * torch.special.ndtri(t)
        sigma = log_sigma.exp()
        data = self.sigma_data
        c_in = 1 / (sigma**2 + data**2).sqrt()
        sign = 1 if self.prediction_type == "epsilon" else -1
        # F = ((1 - c_skip) x0 - c_skip sigma noise) / c_out
        return NoiseLevels(
            signal=c_in,
            sigma=c_in * sigma,
            target_signal=sign * sigma * c_in / data,
            target_sigma=-sign * data * c_in,
            timestep=log_sigma / 4,
        )
