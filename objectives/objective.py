"""The objective of a run: timestep sampling, target and loss weighting as separate choices."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from objectives import WEIGHTINGS, get_function
from objectives.config import ObjectiveConfig
from objectives.densities import Density
from objectives.processes import NoiseLevels, NoiseProcess


@dataclass(frozen=True)
class NoisedBatch:
    """One batch with noise: `noisy` and `target` (B, C, [F,] h, w).

    `error_scale` (B,) turns the error in `target` into the error that the loss is computed from.
    It is 1 in the prediction's own space. `weight` (B,) is the factor on that loss."""

    noisy: Tensor
    target: Tensor
    levels: NoiseLevels
    error_scale: Tensor
    weight: Tensor

    @property
    def timestep(self) -> Tensor:
        """(B,) as the scheduler gives it to the pipeline's loop."""
        return self.levels.timestep

    def at(self, noisy: Tensor, levels: NoiseLevels) -> "NoisedBatch":
        """Return the batch with another input, at other noise levels."""
        return replace(self, noisy=noisy, levels=levels)


def mix(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Return a x + b y, with a, b (B,)."""
    shape = (-1, *[1] * (x.ndim - 1))
    return a.view(shape) * x + b.view(shape) * y


class Objective:
    """A model's noise process, and the options' timestep sampling, loss space and weighting."""

    def __init__(self, process: NoiseProcess, options: ObjectiveConfig):
        self.process, self.options = process, options
        self.density = Density(options, process.t_range)

    def add_noise(
        self,
        latents: Tensor,
        noise: Tensor,
        quantile: Tensor,
        tokens: int,
        input_noise: Tensor | None = None,
    ) -> NoisedBatch:
        """Return the denoiser's input and target at the noise quantiles (B,) in (0, 1).

        `latents`: normalized. `noise`: that of the target; both are (B, C, [F,] h, w).
        `input_noise`: that of the input, if different. `tokens`: of the denoiser, per image."""
        levels = self.process.levels(self.density(quantile), tokens)
        if input_noise is None:
            input_noise = noise
        noisy = mix(levels.signal, latents, levels.sigma, input_noise)
        target = mix(levels.target_signal, latents, levels.target_sigma, noise)
        if self.options.loss_space == "x0":
            error_scale = levels.to_x0
        else:
            error_scale = torch.ones_like(levels.sigma)
        weight = self._weight(levels, error_scale)
        return NoisedBatch(noisy, target, levels, error_scale, weight)

    def _weight(self, levels: NoiseLevels, error_scale: Tensor) -> Tensor:
        """Return the loss weight of each sample, for squared errors scaled by `error_scale`."""
        name = WEIGHTINGS[self.options.loss_weighting]
        if name is None:
            return torch.ones_like(levels.sigma)
        weighting = get_function("weightings", name)
        # weightings are factors on the squared error of x0, the loss is taken of the scaled error
        weight_on_x0 = weighting(levels, self.options)
        x0_error_per_error = levels.to_x0 / error_scale
        return weight_on_x0 * x0_error_per_error**2
