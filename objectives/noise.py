"""Noise modifiers: offset, multi-resolution noise and input perturbation.

Their random numbers come from the sample's own generator, after its standard normal noise."""

import torch
import torch.nn.functional as F
from torch import Tensor

from objectives.config import ObjectiveConfig


def modify_noise(
    noise: Tensor, options: ObjectiveConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return one sample's noise (C, [F,] h, w) for the target, and the noise of the input.

    Multi-resolution noise comes first, then the offset, then the perturbation of the input."""
    if options.multires_noise_iterations:
        noise = add_multires_noise(
            noise, options.multires_noise_iterations, options.multires_noise_discount, generator
        )
    if options.noise_offset:
        shape = (len(noise), *[1] * (noise.ndim - 1))
        offset = torch.randn(shape, generator=generator)
        noise = noise + options.noise_offset * offset
    input_noise = noise
    if options.input_perturbation:
        perturbation = torch.randn(noise.shape, generator=generator)
        input_noise = noise + options.input_perturbation * perturbation
    return noise, input_noise


def add_multires_noise(
    noise: Tensor, iterations: int, discount: float, generator: torch.Generator
) -> Tensor:
    """Add noise of lower resolutions, drawn for each frame separately.

    Level i is normal noise of about 1 / r^i of the size, r uniform in [2, 4), enlarged bilinearly,
    times discount^i; the last level has a side of 1 (Whitaker 2023, "Multi-Resolution Noise for
    Diffusion Model Training"; levels and sizes as in kohya's scripts). The sum is scaled back to
    variance 1. The published method divides by the measured deviation of the batch. Here it is the
    deviation that these levels have on average, so that samples do not depend on each other."""
    height, width = noise.shape[-2:]
    total = noise.clone()
    variance = 1.0
    for level in range(iterations):
        r = 2 + 2 * torch.rand((), generator=generator).item()
        small_height = max(1, int(height / r**level))
        small_width = max(1, int(width / r**level))
        shape = (*noise.shape[:-2], small_height, small_width)
        small = torch.randn(shape, generator=generator)
        small = small.reshape(1, -1, small_height, small_width)
        upsampled = upsample(small, (height, width))
        total += discount**level * upsampled.view(noise.shape)
        height_variance = upsampled_variance(small_height, height)
        width_variance = upsampled_variance(small_width, width)
        variance += discount ** (2 * level) * height_variance * width_variance
        if min(small_height, small_width) == 1:
            break
    return total / variance**0.5


def upsample(small: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale (1, C, h, w) bilinearly."""
    return F.interpolate(small, size=size, mode="bilinear", align_corners=False)


def upsampled_variance(small: int, large: int) -> float:
    """Return the mean variance of `large` numbers interpolated from `small` normal ones."""
    weights = upsample(torch.eye(small)[None, :, None], (1, large))
    return weights.square().sum(1).mean().item()
