"""The loss of a slider: learn the difference between two prompts from the base's own predictions.

The method is that of LECO and of concept sliders (Gandikota et al. 2023, arXiv 2311.12092)."""

import torch
from torch import Tensor, nn

from data.batches import Batch
from data.prompts import EMPTY, NEGATIVE, POSITIVE, TARGET
from lora_algos.adapted_model import AdaptedModel
from objectives.config import SliderConfig
from objectives.densities import EPS
from objectives.objective import NoisedBatch, mix
from objectives.processes import NoiseLevels
from training.loss import LossFunction


class SliderLoss:
    """The loss of each sample in a batch with a slider's prompts.

    WHEN: at the strength of the batch, also in the backward pass, which may recompute blocks."""

    def __init__(self, loss_function: LossFunction, options: SliderConfig):
        self.loss_function, self.options = loss_function, options

    def __call__(self, denoiser: nn.Module, adapted: AdaptedModel, batch: Batch) -> Tensor:
        """Return (B,) losses in fp32."""
        noised = self.loss_function.add_noise(batch)
        if self.options.start_from == "noise":
            denoiser.eval()  # without dropout, as when samples are drawn
            noised = self.draw(denoiser, batch, noised)
            denoiser.train()
        goal = self._goal(denoiser, adapted, batch, noised)
        prediction = self._predict(denoiser, batch, noised, TARGET)
        return self.loss_function.compare(
            prediction,
            goal,
            noised,
            batch,
        )

    @torch.no_grad()
    def _goal(
        self, denoiser: nn.Module, adapted: AdaptedModel, batch: Batch, noised: NoisedBatch
    ) -> Tensor:
        """Return what the adapted model should predict for the target."""
        base = {}
        with adapted.at_strength(0.0):
            for role in (TARGET, POSITIVE, NEGATIVE):
                base[role] = self._predict(
                    denoiser,
                    batch,
                    noised,
                    role,
                )
        difference = base[POSITIVE] - base[NEGATIVE]
        factor = batch.strength * self.options.scale
        return base[TARGET] + factor * difference

    @torch.no_grad()
    def draw(self, denoiser: nn.Module, batch: Batch, noised: NoisedBatch) -> NoisedBatch:
        """Return the batch with latents that the adapted model draws, from pure noise down to the
        batch's noise levels.

        All samples take the same number of steps, so all processes make as many passes."""
        objective = self.loss_function.objective
        num_tokens = self.loss_function.num_tokens(batch)
        num_steps = self.options.denoising_steps
        start = 1 - EPS
        end = objective.density(batch.quantile)
        levels = objective.process.levels(torch.full_like(end, start), num_tokens)
        noise = batch.noise
        clean = torch.zeros_like(noise)
        for step in range(1, num_steps + 1):
            noisy = mix(levels.signal, clean, levels.sigma, noise)
            current = noised.at(noisy, levels)
            prediction = self._guided(denoiser, batch, current)
            clean, noise = split_noisy(noisy, prediction, levels)
            share = step / num_steps
            t = start + share * (end - start)
            levels = objective.process.levels(t, num_tokens)
        noisy = mix(levels.signal, clean, levels.sigma, noise)
        return noised.at(noisy, levels)

    def _guided(self, denoiser: nn.Module, batch: Batch, noised: NoisedBatch) -> Tensor:
        """Return the prediction for the target with classifier-free guidance."""
        with_prompt = self._predict(denoiser, batch, noised, TARGET)
        if not self.options.uses_guidance:
            return with_prompt
        without_prompt = self._predict(denoiser, batch, noised, EMPTY)
        return torch.lerp(
            without_prompt,
            with_prompt,
            self.options.guidance,
        )

    def _predict(self, denoiser: nn.Module, batch: Batch, noised: NoisedBatch, role: str) -> Tensor:
        """Return the prediction for one of the batch's prompts in fp32."""
        prediction = self.loss_function.predict(
            denoiser,
            noised,
            batch,
            batch.prompts[role],
        )
        return prediction.float()


def split_noisy(noisy: Tensor, prediction: Tensor, levels: NoiseLevels) -> tuple[Tensor, Tensor]:
    """Return the denoised latents and the noise that a prediction says are in noisy latents.

    They solve noisy = signal x0 + sigma noise, and prediction = target_signal x0 + target_sigma
    noise."""
    determinant = levels.signal * levels.target_sigma - levels.sigma * levels.target_signal
    clean = mix(
        levels.target_sigma / determinant,
        noisy,
        -levels.sigma / determinant,
        prediction,
    )
    noise = mix(
        levels.signal / determinant,
        prediction,
        -levels.target_signal / determinant,
        noisy,
    )
    return clean, noise
