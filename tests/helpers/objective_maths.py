"""The formulas of objectives, written independently of the product code."""

import torch
from torch import Tensor, nn

from data.batches import Batch
from helpers.objective_cases import QUANTILES, TOKENS
from objectives.config import ObjectiveConfig
from objectives.processes import NoiseProcess


class FakeFamily:
    """A family that triples latents to normalize them, and whose prediction is fixed."""

    def __init__(self, prediction: Tensor, process: NoiseProcess | None = None):
        self.prediction, self.own_process = prediction, process

    def normalize(self, latents: Tensor) -> Tensor:
        return latents * 3

    @property
    def limits(self) -> "FakeFamily":
        return self

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        return TOKENS

    def size_conditioning(self, crop: Tensor) -> dict[str, Tensor]:
        return {}

    def process(self, options: ObjectiveConfig) -> NoiseProcess:
        self.asked = options
        return self.own_process

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Tensor]
    ) -> Tensor:
        self.seen = (noisy, timestep, cond)
        return self.prediction


def batch_of(latents: Tensor, noise: Tensor) -> Batch:
    cond = {
        "prompt_embeds": torch.ones(len(latents), 3, 2),
        "attention_mask": torch.ones(len(latents), 3).long(),
    }
    count = len(latents)
    return Batch(
        latents, noise, QUANTILES, cond, torch.ones(count), torch.zeros(count, 8), range(count)
    )
