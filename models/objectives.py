"""Noise processes: from clean latents, noise and a quantile to what the denoiser sees and should answer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noised:
    """One noised batch: `noisy` and `target` (B, C, h, w), `timestep` (B,) as the denoiser wants it.

    `error_scale` (B,) turns the error in `target` into the error the loss is taken of: 1 in the prediction's own space.
    """

    noisy: Tensor
    timestep: Tensor
    target: Tensor
    error_scale: Tensor


class Objective(ABC):
    """A noise process and what the denoiser is trained to predict in it."""

    @abstractmethod
    def noised(self, latents: Tensor, noise: Tensor, quantile: Tensor) -> Noised:
        """`latents` normalised, `noise` standard normal, both (B, C, h, w); `quantile` (B,) in (0, 1)."""


class DDPM(Objective):
    """Variance-preserving diffusion: noisy = sqrt(a) x0 + sqrt(1 - a) noise, with a = alphas_cumprod[timestep].

    Target `epsilon` is the noise, `v_prediction` is sqrt(a) noise - sqrt(1 - a) x0 (Salimans & Ho 2022, appendix D).
    The quantile picks the timestep uniformly. In `x0` loss space the error of the denoised latents, at the scale of x0,
    is compared: sqrt((1 - a) / a) times the error in epsilon, sqrt(1 - a) times the error in v.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction_type: Literal["epsilon", "v_prediction"],
        loss_space: Literal["prediction", "x0"],
    ):
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {prediction_type!r}: only epsilon and v_prediction are known")
        self.alphas_cumprod = alphas_cumprod.float()
        self.prediction_type = prediction_type
        self.loss_space = loss_space

    def noised(self, latents: Tensor, noise: Tensor, quantile: Tensor) -> Noised:
        count = len(self.alphas_cumprod)
        timestep = (quantile * count).long().clamp(0, count - 1)
        if self.alphas_cumprod.device != latents.device:
            self.alphas_cumprod = self.alphas_cumprod.to(latents.device)  # once: later steps copy nothing
        alpha_cumprod = self.alphas_cumprod[timestep].to(latents.dtype)
        signal, sigma = alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
        shape = (-1, *[1] * (latents.ndim - 1))
        noisy = signal.view(shape) * latents + sigma.view(shape) * noise
        if self.prediction_type == "epsilon":
            target, to_x0 = noise, sigma / signal
        else:
            target, to_x0 = signal.view(shape) * noise - sigma.view(shape) * latents, sigma
        error_scale = to_x0 if self.loss_space == "x0" else torch.ones_like(sigma)
        return Noised(noisy, timestep, target, error_scale)
