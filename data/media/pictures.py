"""Pictures from pixels."""

import numpy as np
from PIL import Image
from torch import Tensor


def to_image(pixels: Tensor) -> Image.Image:
    """Convert pixels (3, H, W) in [-1, 1] to an image."""
    limited = pixels.float().clamp(-1, 1)
    values = (limited + 1) / 2
    channels_last = values.permute(1, 2, 0)
    array = channels_last.numpy()
    levels = to_levels(array)
    return Image.fromarray(levels)


def to_levels(array: np.ndarray) -> np.ndarray:
    """Convert values in [0, 1] to 8-bit levels."""
    levels = 255 * array
    return levels.round().astype(np.uint8)
