"""Control images: images that an edit model is given besides the prompt.

A sample's control images are encoded by the VAE once, like the image itself. Their raw latents are the
tensors `control_0`, `control_1` and so on of its conditioning. Features of a vision model, if there is
one, are `control_0_features` and so on. Samples whose control images have other sizes, or another
number of them, are in other batches.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image, ImageOps
from torch import Tensor

from common.errors import counted

CONTROL_PREFIX = "control_"
FEATURES_SUFFIX = "_features"


class ControlSize(NamedTuple):
    """The size in pixels to which a control image is scaled, and the window in its middle that the
    model is given."""

    scaled_width: int
    scaled_height: int
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class ControlImage:
    """A control image as the encoders get it."""

    picture: Image.Image
    """The image in its own size."""
    is_mirrored: bool
    """True if its sample is mirrored."""
    size: ControlSize
    pixels: Tensor
    """The window that the model is given, (3, H, W) in [-1, 1]."""

    def scaled(self) -> Image.Image:
        """Return the scaled image without its crop, mirrored if its sample is."""
        picture = ImageOps.mirror(self.picture) if self.is_mirrored else self.picture
        size = (self.size.scaled_width, self.size.scaled_height)
        return picture.resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class ControlLimits:
    """The control images that a model takes."""

    max_count: int = 0
    """Control images of a sample; 0: the model takes none."""
    usual_count: int = 0
    """Control images of a usual sample, for which memory is planned."""
    is_required: bool = False
    """True if the model cannot be called without a control image."""
    is_seen_by_text_encoder: bool = False
    """True if the text encoder is given the control images with the caption."""

    def count_error(self, count: int) -> str | None:
        """Return an error if the model does not take so many control images."""
        if count == 0 and self.is_required:
            return "no control image, which this model needs"
        if count > self.max_count:
            allowed = f"at most {self.max_count}" if self.max_count else "none"
            return f"{counted(count, 'control image')}; this model takes {allowed}"
        return None


NO_CONTROLS = ControlLimits()


def control_name(number: int) -> str:
    """Return the name of the latents of a control image, which are numbered from 0."""
    return f"{CONTROL_PREFIX}{number}"


def features_name(number: int) -> str:
    """Return the name of a vision model's features of a control image."""
    return control_name(number) + FEATURES_SUFFIX


def is_control_latents(name: str) -> bool:
    """Return whether a tensor of this name is the latents of a control image."""
    return name.startswith(CONTROL_PREFIX) and name.removeprefix(CONTROL_PREFIX).isdigit()


def control_latents(cond: Mapping[str, Any]) -> list[Tensor]:
    """Return the raw latents (B, C, h, w) of all control images, in their order."""
    latents: list[Tensor] = []
    name = control_name(0)
    while name in cond:
        latents.append(cond[name])
        name = control_name(len(latents))
    return latents


def control_features(cond: Mapping[str, Any]) -> list[Tensor]:
    """Return the features (B, rows, columns, D) of all control images, or of none."""
    names = [features_name(number) for number in range(len(control_latents(cond)))]
    return [cond[name] for name in names if name in cond]


def without_controls(cond: dict[str, Any]) -> dict[str, Any]:
    """Return conditioning without control images."""
    other_tensors = {}
    for name, value in cond.items():
        if not name.startswith(CONTROL_PREFIX):
            other_tensors[name] = value
    return other_tensors


def whole_image(width: int, height: int) -> ControlSize:
    """Return a size without a crop."""
    return ControlSize(width, height, width, height)


def limited_area(width: float, height: float, max_pixels: int | None) -> tuple[float, float]:
    """Return a size of the same aspect ratio with at most `max_pixels`. None: no limit."""
    area = width * height
    if max_pixels is None or area <= max_pixels:
        return width, height
    scale = math.sqrt(max_pixels / area)
    return width * scale, height * scale


def rounded_down(side: float, step: int) -> int:
    """Return the largest multiple of `step` up to `side`, and at least one step."""
    num_steps = int(side) // step
    return step * max(1, num_steps)
