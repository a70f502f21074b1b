"""Predictions of a family beside diffusers' own."""

import torch
from torch import Tensor

from helpers.family_cases import PROMPTS, Case, collate, family_of, folder_of
from models.config import ModelConfig
from models.detect import get_family


def rows_of(case: Case, captions: list[str] = PROMPTS) -> list[dict[str, Tensor]]:
    family = family_of(case)
    with torch.no_grad():
        return family.encode_prompt(family.load_encoders("text"), captions)


def prediction(
    case: Case, rows: list[dict[str, Tensor]], noisy: Tensor, **options: float
) -> Tensor:
    """At timestep 700."""
    family = get_family(ModelConfig(path=str(folder_of(case)), **options))
    denoiser = family.load_denoiser(torch.float32).eval()
    with torch.no_grad():
        return family.predict(
            denoiser, noisy, torch.full((len(noisy),), 700.0), collate(family, rows)
        )


def noise(batch: int = 2) -> Tensor:
    return torch.randn(batch, 16, 8, 8, generator=torch.Generator().manual_seed(1))
