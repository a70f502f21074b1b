"""What is trained for: the density of noise levels, the target and the weighting, as three separate
choices."""

from dataclasses import dataclass

import torch
from torch import Tensor

from objectives import WEIGHTINGS, get_function
from objectives.config import ObjectiveConfig
from objectives.densities import Density
from objectives.processes import Levels, NoiseProcess


@dataclass(frozen=True)
class Noised:
    """One noised batch: `noisy` and `target` (B, C, [F,] h, w).

    `error_scale` (B,) turns the error in `target` into the error the loss is taken of: 1 in the prediction's own space.
    `weight` (B,) is the factor on that loss.
    """

    noisy: Tensor
    target: Tensor
    levels: Levels
    error_scale: Tensor
    weight: Tensor

    @property
    def timestep(self) -> Tensor:
        """(B,) as the scheduler hands it to the pipeline's loop."""
        return self.levels.timestep


def mixed(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a x + b y, with a, b (B,)."""
    shape = (-1, *[1] * (x.ndim - 1))
    return a.view(shape) * x + b.view(shape) * y


class Objective:
    """A model's noise process, and the options' density, loss space and weighting."""

    def __init__(self, process: NoiseProcess, options: ObjectiveConfig):
        self.process, self.options = process, options
        self.density = Density(options, process.span)

    def noised(
        self,
        latents: Tensor,
        noise: Tensor,
        quantile: Tensor,
        tokens: int,
        input_noise: Tensor | None = None,
    ) -> Noised:
        """`latents` normalized, `noise` the noise of the target, both (B, C, [F,] h, w); `quantile`
        (B,) in (0, 1).

        `input_noise`: the noise that the denoiser sees, where it is another. `tokens`: of the
        denoiser, per image.
        """
        levels = self.process.levels(self.density(quantile), tokens)
        noisy = mixed(
            levels.signal, latents, levels.sigma, noise if input_noise is None else input_noise
        )
        target = mixed(levels.target_signal, latents, levels.target_sigma, noise)
        error_scale = (
            levels.to_x0 if self.options.loss_space == "x0" else torch.ones_like(levels.sigma)
        )
        return Noised(noisy, target, levels, error_scale, self._weight(levels, error_scale))

    def _weight(self, levels: Levels, error_scale: Tensor) -> Tensor:
        """Return the loss weight of each sample, for squared errors that are scaled by
        `error_scale`."""
        if self.options.loss_weighting == "none":
            return torch.ones_like(levels.sigma)
        weighting = get_function("weightings", WEIGHTINGS[self.options.loss_weighting])
        return weighting(levels, self.options) * (levels.to_x0 / error_scale) ** 2
