"""The loss of a micro-batch: the only code that training and validation share with the model."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from data.batches import Batch
from models.base import ModelFamily
from objectives import LOSSES, get_function
from objectives.config import ObjectiveConfig
from objectives.objective import NoisedBatch, Objective


class LossFunction:
    """The loss of each sample in a batch, for one family, objective and base dtype."""

    def __init__(self, family: ModelFamily, objective: Objective, name: str, dtype: torch.dtype):
        self.family, self.objective, self.dtype = family, objective, dtype
        self.entry = LOSSES[name]
        self.compare = get_function("losses", self.entry.function)

    @cached_property
    def for_validation(self) -> "LossFunction":
        """The mean squared error of the prediction, at quantiles of the model's own noise process,
        without weighting.

        It is comparable between runs with different objectives. Only the prediction type is as in
        training."""
        trained = self.objective.options
        options = ObjectiveConfig(
            prediction_type=trained.prediction_type, zero_terminal_snr=trained.zero_terminal_snr
        )
        return LossFunction(
            self.family, Objective(self.family.process(options), options), "MSE", self.dtype
        )

    def __call__(self, denoiser: nn.Module, batch: Batch) -> Tensor:
        """Return (B,) losses in fp32: the mean over each sample's elements, times its mask and
        weights."""
        latents = self.family.normalize(batch.latents.float())
        num_tokens = self.family.limits.num_tokens(latents.shape)
        noised = self.objective.add_noise(
            latents, batch.noise, batch.quantile, num_tokens, batch.input_noise
        )
        cond = {
            **self.family.size_conditioning(batch.crop),
            **batch.cond,
        }  # sizes in the data override computed ones
        cond = {name: self._to_base_dtype(value) for name, value in cond.items()}
        prediction = self.family.predict(
            denoiser, noised.noisy.to(self.dtype), noised.timestep, cond
        )
        delta = self._delta(noised)
        # all losses are functions of the error, so scaling prediction and target scales the error
        scale = (noised.error_scale / delta).view(-1, *[1] * (prediction.ndim - 1))
        losses = self.compare(prediction.float() * scale, noised.target.float() * scale)
        if batch.mask is not None:
            losses = losses * batch.mask.unflatten(0, (-1, *[1] * (losses.ndim - 3)))
        factor = noised.weight * delta ** (self.entry.delta_power or 0)
        return losses.flatten(1).mean(1) * batch.weight * factor

    def _to_base_dtype(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        return value

    def _delta(self, noised: NoisedBatch) -> Tensor:
        """Return (B,) deltas of the loss at each sample's noise level.

        The schedules are those of kohya's scripts (library/train_util.py,
        get_huber_threshold_if_needed), for all noise processes."""
        options, levels = self.objective.options, noised.levels
        if options.huber_schedule == "exponential":
            return options.huber_delta ** self.objective.process.relative_timestep(levels)
        if options.huber_schedule == "snr":
            return (1 - options.huber_delta) / (
                1 + levels.sigma / levels.signal
            ) ** 2 + options.huber_delta
        return torch.full_like(levels.sigma, options.huber_delta)


def build_loss(
    family: ModelFamily, options: ObjectiveConfig, name: str, dtype: torch.dtype
) -> LossFunction:
    """Build the loss of a config. Raises ModelError for options without effect on the model."""
    return LossFunction(family, Objective(family.process(options), options), name, dtype)
