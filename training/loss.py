"""The loss of a micro-batch: the only code that training and validation share with the model."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from data.batches import Batch
from data.prompts import NEUTRAL
from lora_algos.adapted_model import AdaptedModel
from models.base import ModelFamily
from objectives import LOSSES, get_function
from objectives.config import ObjectiveConfig
from objectives.objective import NoisedBatch, Objective


class LossFunction:
    """The loss of each sample in a batch, for one family, objective and base dtype."""

    def __init__(self, family: ModelFamily, objective: Objective, name: str, dtype: torch.dtype):
        self.family, self.objective, self.dtype = family, objective, dtype
        self.entry = LOSSES[name]
        self.elementwise = get_function("losses", self.entry.function)

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
        noised = self.add_noise(batch)
        prediction = self.predict(denoiser, noised, batch, batch.cond)
        return self.compare(prediction, noised.target, noised, batch)

    def compare(
        self, prediction: Tensor, target: Tensor, noised: NoisedBatch, batch: Batch
    ) -> Tensor:
        """Return (B,) losses of a prediction in fp32, with the mask and the weights of the batch."""
        delta = self._delta(noised)
        # all losses are functions of the error, so scaling prediction and target scales the error
        scale = (noised.error_scale / delta).view(-1, *[1] * (prediction.ndim - 1))
        losses = self.elementwise(prediction.float() * scale, target.float() * scale)
        if batch.mask is not None:
            losses = losses * batch.mask.unflatten(0, (-1, *[1] * (losses.ndim - 3)))
        factor = noised.weight * delta ** (self.entry.delta_power or 0)
        return losses.flatten(1).mean(1) * batch.weight * factor

    def preservation(self, denoiser: nn.Module, adapted: AdaptedModel, batch: Batch) -> Tensor:
        """Return (B,) mean squared differences from the frozen base's prediction for the neutral prompt.

        Noise and noise levels are those of the batch."""
        neutral = batch.prompts[NEUTRAL]
        noised = self.add_noise(batch)
        with torch.no_grad(), adapted.at_strength(0.0):
            target = self.predict(denoiser, noised, batch, neutral)
        prediction = self.predict(denoiser, noised, batch, neutral)
        difference = prediction.float() - target.float()
        return difference.square().flatten(1).mean(1)

    def num_tokens(self, batch: Batch) -> int:
        """Return the number of the denoiser's tokens for one image of a batch."""
        return self.family.limits.num_tokens(batch.latents.shape)

    def add_noise(self, batch: Batch) -> NoisedBatch:
        """Return the denoiser's input and target for a batch."""
        return self.objective.add_noise(
            self.family.normalize(batch.latents.float()),
            batch.noise,
            batch.quantile,
            self.num_tokens(batch),
            batch.input_noise,
        )

    def predict(
        self, denoiser: nn.Module, noised: NoisedBatch, batch: Batch, conditioning: dict[str, Any]
    ) -> Tensor:
        """Return the prediction, shaped like the latents."""
        sizes = self.family.size_conditioning(batch.crop)
        cond = {}
        for name, value in {**sizes, **conditioning}.items():  # sizes in the data override these
            cond[name] = self._to_base_dtype(value)
        return self.family.predict(
            denoiser,
            noised.noisy.to(self.dtype),
            noised.timestep,
            cond,
        )

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
