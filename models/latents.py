"""The scale of latents: from what a VAE makes to what its denoiser was trained on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class LatentScale:
    """(x - shift) * scale, or (x - mean) * scale / std per channel, as the VAE's config says."""

    def __init__(self, config: Mapping[str, Any], shift: float, scale: float):
        """`shift` and `scale` are of a VAE without statistics whose config does not say."""
        self.shift = config.get("shift_factor") or shift
        self.scale = config.get("scaling_factor") or scale
        self.moments: tuple[Tensor, Tensor] | None = None
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            self.moments = torch.tensor(mean), torch.tensor(std) / (config.get("scaling_factor") or 1.0)

    def __call__(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, [F,] h, w) normalised."""
        if self.moments is None:
            return (latents - self.shift) * self.scale if self.shift else latents * self.scale
        if self.moments[0].device != latents.device:  # once: later steps copy nothing
            self.moments = self.moments[0].to(latents.device), self.moments[1].to(latents.device)
        mean, deviation = (moment.view(-1, *[1] * (latents.ndim - 2)) for moment in self.moments)
        return ((latents - mean) / deviation).to(latents.dtype)
