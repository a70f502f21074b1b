"""What the noise of a sample is besides standard normal, drawn after it from the sample's own
generator."""

import torch
import torch.nn.functional as F
from torch import Tensor

from objectives.config import ObjectiveConfig


def altered(
    noise: Tensor, options: ObjectiveConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One sample's noise (C, [F,] h, w) as `options` ask, and the noise that the denoiser is to
    see.

    Multi-resolution noise comes first, then the offset, then what the denoiser sees more (input
    perturbation).
    """
    if options.multires_noise_iterations:
        noise = multires(
            noise, options.multires_noise_iterations, options.multires_noise_discount, generator
        )
    if options.noise_offset:
        offset = torch.randn((len(noise), *[1] * (noise.ndim - 1)), generator=generator)
        noise = noise + options.noise_offset * offset
    seen = noise
    if options.input_perturbation:
        seen = noise + options.input_perturbation * torch.randn(noise.shape, generator=generator)
    return noise, seen


def multires(noise: Tensor, iterations: int, discount: float, generator: torch.Generator) -> Tensor:
    """Noise of several resolutions, each frame's own (Whitaker 2023, "Multi-Resolution Noise for Diffusion Model
    Training"; levels and sizes as in kohya's scripts).

    Level i is normal noise of about 1 / r^i of the size, r uniform in [2, 4), enlarged bilinearly, times discount^i;
    the last has a side of 1. The sum is scaled back to variance 1. Published is division by the measured deviation of
    the batch; here it is the deviation that these levels have on average, so that no sample depends on the others.
    """
    height, width = noise.shape[-2:]
    total, variance = noise.clone(), 1.0
    for level in range(iterations):
        r = 2 + 2 * torch.rand((), generator=generator).item()
        size = max(1, int(height / r**level)), max(1, int(width / r**level))
        small = torch.randn((*noise.shape[:-2], *size), generator=generator).reshape(1, -1, *size)
        total += discount**level * enlarged(small, (height, width)).view(noise.shape)
        variance += (
            discount ** (2 * level) * kept_variance(size[0], height) * kept_variance(size[1], width)
        )
        if 1 in size:
            break
    return total / variance**0.5


def enlarged(small: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, C, h, w) scaled bilinearly."""
    return F.interpolate(small, size=size, mode="bilinear", align_corners=False)


def kept_variance(small: int, large: int) -> float:
    """The mean variance of `large` numbers that are interpolated from `small` normal ones."""
    weights = enlarged(torch.eye(small)[None, :, None], (1, large))
    return weights.square().sum(1).mean().item()
