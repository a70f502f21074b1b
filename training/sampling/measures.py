"""Two rough numbers about samples that need no network: are they copies of the data, and do their colors
drift?

Both compare small images. They see a copied composition and burned colors, and nothing subtle.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from PIL import Image

from data.media.pictures import to_levels

SIDE = 16
"""Height and width of a small image in pixels."""
NUM_VALUES = 3 * SIDE**2
"""Numbers of a small image."""
LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in the brightness (ITU-R BT.601)."""
TINY = 1e-6


@dataclass(frozen=True)
class DataImages:
    """Small versions of training images, for distances."""

    small_images: np.ndarray
    """(images, SIDE * SIDE * 3), in [0, 1]."""
    typical_distance: float
    """Median distance of an image to the image that is nearest to it."""

    @classmethod
    def of(cls, small_images: np.ndarray) -> "DataImages | None":
        """Return the images with their distances; None if there are fewer than two different ones."""
        if len(small_images) < 2:
            return None
        nearest = []
        for index, image in enumerate(small_images):
            distances = rms_distances(small_images, image)
            distances[index] = np.inf
            nearest.append(distances.min())
        typical_distance = float(np.median(nearest))
        if typical_distance < TINY:
            return None
        return cls(small_images, typical_distance)

    @classmethod
    def from_text(cls, text: str) -> "DataImages | None":
        """Return the images in a text of `as_text`; None if there are too few, or the text is cut."""
        try:
            content = base64.b64decode(text)
        except ValueError:
            return None
        if len(content) % NUM_VALUES:
            return None
        levels = np.frombuffer(content, np.uint8)
        images = levels.reshape(-1, NUM_VALUES)
        small_images = images / 255
        return cls.of(small_images)

    def relative_distance(self, image: np.ndarray) -> float:
        """Return the distance of an image (H, W, 3) in [0, 1] to the nearest training image.

        1 is the typical distance between training images, and 0 is a copy."""
        small = small_image(image)
        distances = rms_distances(self.small_images, small)
        nearest = float(distances.min())
        return nearest / self.typical_distance


def as_text(small_images: Sequence[np.ndarray]) -> str:
    """Return small images as a text for a JSON file."""
    values = np.array(small_images)
    levels = to_levels(values)
    content = levels.tobytes()
    code = base64.b64encode(content)
    return code.decode()


def small_image(image: np.ndarray) -> np.ndarray:
    """Return an image (H, W, 3) in [0, 1] with SIDE x SIDE pixels, flattened."""
    levels = to_levels(image)
    whole = Image.fromarray(levels)
    small = whole.resize((SIDE, SIDE), Image.Resampling.BOX)
    values = np.asarray(small, float) / 255
    return values.ravel()


def rms_distances(images: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Return the root mean square difference between each of the images (n, values) and one image."""
    squares = (images - image) ** 2
    means = squares.mean(axis=1)
    return np.sqrt(means)


def contrast(image: np.ndarray) -> float:
    """Return the standard deviation of the brightness of an image (H, W, 3) in [0, 1]."""
    brightness = image @ LUMA
    return float(brightness.std())


def saturation(image: np.ndarray) -> float:
    """Return the mean difference between the largest and the smallest channel of an image."""
    largest = image.max(axis=-1)
    smallest = image.min(axis=-1)
    difference = largest - smallest
    return float(difference.mean())


def ratio(value: float, base_value: float) -> float:
    """Return a value relative to that of the base model's sample."""
    return value / max(base_value, TINY)


def measure_samples(
    images: Sequence[np.ndarray],
    base_images: Sequence[np.ndarray],
    data: DataImages | None,
) -> dict[str, float]:
    """Return the metrics of the samples of a step: means over (H, W, 3) in [0, 1].

    `base_images`: samples of the base model with the same prompts; empty if none were drawn."""
    metrics: dict[str, float] = {}
    if data is not None:
        distances = [data.relative_distance(image) for image in images]
        metrics["samples/nearest_image"] = fmean(distances)
    if len(base_images) != len(images):
        return metrics
    contrasts = []
    saturations = []
    for image, base_image in zip(images, base_images, strict=True):
        relative_contrast = ratio(contrast(image), contrast(base_image))
        relative_saturation = ratio(saturation(image), saturation(base_image))
        contrasts.append(relative_contrast)
        saturations.append(relative_saturation)
    metrics["samples/contrast"] = fmean(contrasts)
    metrics["samples/saturation"] = fmean(saturations)
    return metrics
