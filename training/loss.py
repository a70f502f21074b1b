"""The loss of one micro-batch: the only code that training and validation share with the model."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from data.batches import Batch
from models.base import ModelFamily
from objectives.config import DELTA_LOSSES, ObjectiveConfig
from objectives.losses import LOSSES, POWERS
from objectives.objective import Noised, Objective

assert set(POWERS) == set(DELTA_LOSSES)


class LossFunction:
    """Loss per sample of a batch, for one family, objective and base dtype."""

    def __init__(self, family: ModelFamily, objective: Objective, name: str, dtype: torch.dtype):
        self.family, self.objective, self.name, self.dtype = family, objective, name, dtype
        self.compare = LOSSES[name]

    @cached_property
    def for_validation(self) -> "LossFunction":
        """Mean squared error of the prediction, at quantiles of the model's own noise process, without weighting:
        comparable between runs of different objectives. Only what the base predicts is as in training."""
        asked = self.objective.options
        plain = ObjectiveConfig(prediction_type=asked.prediction_type, zero_terminal_snr=asked.zero_terminal_snr)
        return LossFunction(self.family, Objective(self.family.process(plain), plain), "MSE", self.dtype)

    def __call__(self, denoiser: nn.Module, batch: Batch) -> Tensor:
        """(B,) losses in fp32, each the mean over one sample's elements, times its mask and weights."""
        latents = self.family.normalise(batch.latents.float())
        tokens = self.family.tokens(latents.shape)
        noised = self.objective.noised(latents, batch.noise, batch.quantile, tokens, batch.input_noise)
        cond = {**self.family.size_cond(batch.crop), **batch.cond}  # sizes that the data states count more
        cond = {name: self._cast(value) for name, value in cond.items()}
        prediction = self.family.predict(denoiser, noised.noisy.to(self.dtype), noised.timestep, cond)
        delta = self._delta(noised)
        # every loss here is a function of the difference alone, so scaling both sides scales the error
        scale = (noised.error_scale / delta).view(-1, *[1] * (prediction.ndim - 1))
        losses = self.compare(prediction.float() * scale, noised.target.float() * scale, reduction="none")
        if batch.mask is not None:
            losses = losses * batch.mask.unflatten(0, (-1, *[1] * (losses.ndim - 3)))
        factor = noised.weight * delta ** POWERS.get(self.name, 0)
        return losses.flatten(1).mean(1) * batch.weight * factor

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _delta(self, noised: Noised) -> Tensor:
        """(B,) the losses' delta at each sample's noise level. The schedules are those of kohya's scripts
        (library/train_util.py, get_huber_threshold_if_needed), for all noise processes."""
        options, levels = self.objective.options, noised.levels
        if options.huber_schedule == "exponential":
            return options.huber_delta ** self.objective.process.time(levels)
        if options.huber_schedule == "snr":
            return (1 - options.huber_delta) / (1 + levels.sigma / levels.signal) ** 2 + options.huber_delta
        return torch.full_like(levels.sigma, options.huber_delta)


def build_loss(family: ModelFamily, options: ObjectiveConfig, name: str, dtype: torch.dtype) -> LossFunction:
    """The loss that a config asks for. Raises ModelError for options that the model has no use for."""
    return LossFunction(family, Objective(family.process(options), options), name, dtype)
