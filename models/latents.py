"""Latents: their scale in training, and the frame axis that images have in some models."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class LatentScale:
    """The scale of a denoiser's latents, from the config of its VAE.

    This is (x - shift) * scale or, if the config has statistics, (x - mean) * scale / std per
    channel."""

    def __init__(self, config: Mapping[str, Any], default_shift: float, default_scale: float):
        """The defaults are those of a VAE whose config has neither statistics nor factors."""
        scaling_factor = config.get("scaling_factor")
        self.shift = config.get("shift_factor") or default_shift
        self.scale = scaling_factor or default_scale
        mean = config.get("latents_mean")
        std = config.get("latents_std")
        self.has_statistics = mean is not None and std is not None
        self.mean = torch.empty(0)
        self.deviation = torch.empty(0)
        if self.has_statistics:
            self.mean = torch.tensor(mean)
            self.deviation = torch.tensor(std) / (scaling_factor or 1.0)

    def __call__(self, latents: Tensor) -> Tensor:
        """Normalize raw latents (B, C, [F,] h, w)."""
        if self.has_statistics:
            return self._by_statistics(latents)
        if not self.shift:
            return latents * self.scale
        return (latents - self.shift) * self.scale

    def _by_statistics(self, latents: Tensor) -> Tensor:
        self._move_to(latents.device)
        shape = (-1, *[1] * (latents.ndim - 2))
        mean = self.mean.view(shape)
        deviation = self.deviation.view(shape)
        normalized = (latents - mean) / deviation
        return normalized.to(latents.dtype)

    def _move_to(self, device: torch.device) -> None:
        """Move the statistics to the device in the first step; later steps copy nothing."""
        if self.mean.device == device:
            return
        self.mean = self.mean.to(device)
        self.deviation = self.deviation.to(device)


def with_frame_axis(latents: Tensor, has_frame_axis: bool) -> Tensor:
    """Return latents or pixels (B, C, [F,] h, w) with a frame axis, or without it.

    It is removed only from single images and from videos of one frame."""
    if (latents.ndim == 5) == has_frame_axis:
        return latents
    return latents.unsqueeze(2) if has_frame_axis else latents.squeeze(2)
