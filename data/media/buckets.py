"""Aspect ratio buckets: image sizes of about one area, and the scaling and cropping to them."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from data.config import DataConfig


class Size(NamedTuple):
    """A size in pixels."""

    width: int
    height: int

    @property
    def log_ratio(self) -> float:
        """Logarithm of the aspect ratio."""
        return math.log(self.width / self.height)


@dataclass(frozen=True)
class Crop:
    """Size of an image, the size to which it is scaled, and the window of that which is used.

    Everything is in pixels. `width` and `height` are those of the image after its EXIF rotation.
    """

    width: int
    height: int
    scaled_width: int
    scaled_height: int
    left: int
    top: int
    crop_width: int
    crop_height: int

    def describe(self) -> str:
        """Return a text that is equal for crops which make the same pixels of the same file."""
        scaled = f"{self.scaled_width}x{self.scaled_height}+{self.left}+{self.top}"
        return f"{scaled} {self.crop_width}x{self.crop_height}"


@dataclass(frozen=True)
class Buckets:
    """The sizes that images may have: sides are multiples of `step`, areas at most resolution^2."""

    resolution: int
    step: int
    min_side: int
    max_side: int
    upscale: bool = True
    only_square: bool = False

    @classmethod
    def of(cls, config: DataConfig, step: int, only_square: bool) -> "Buckets":
        """Return the buckets that are configured. `step`: the smallest step of the model."""
        return cls(
            resolution=config.resolution,
            step=config.bucket_step or step,
            min_side=config.bucket_min_side or config.resolution // 2,
            max_side=config.bucket_max_side or config.resolution * 2,
            upscale=config.upscale,
            only_square=only_square,
        )

    def all_sizes(self) -> list[Size]:
        """Return the sizes of all buckets of the whole area."""
        if self.only_square:
            return [self._square(self.resolution)]
        return self._sizes(self.resolution)

    def size(self, width: int, height: int) -> Size:
        """Return the size of the bucket for an image.

        It is the size with the nearest aspect ratio, on a logarithmic scale, among those that have
        the largest area for their width."""
        if self.only_square:
            side = self.resolution
            if not self.upscale:
                side = min(side, width, height)
            return self._square(side)
        resolution = self.resolution
        if not self.upscale:
            resolution = min(resolution, math.isqrt(width * height))
        ratio = Size(width, height).log_ratio
        sizes = self._sizes(max(resolution, self.step))
        return min(sizes, key=lambda size: abs(size.log_ratio - ratio))

    def crop(self, width: int, height: int) -> Crop:
        """Return the crop that scales an image to just cover its bucket, and keeps the middle."""
        size = self.size(width, height)
        scale = max(size.width / width, size.height / height)
        scaled_width = max(size.width, round(width * scale))
        scaled_height = max(size.height, round(height * scale))
        return Crop(
            width=width,
            height=height,
            scaled_width=scaled_width,
            scaled_height=scaled_height,
            left=(scaled_width - size.width) // 2,
            top=(scaled_height - size.height) // 2,
            crop_width=size.width,
            crop_height=size.height,
        )

    def _sizes(self, resolution: int) -> list[Size]:
        """Return all sizes for an area. The square comes first, so that it wins a tie."""
        scale = resolution / self.resolution
        min_side = self._round_down(self.min_side * scale)
        max_side = max(min_side, self._round_down(self.max_side * scale))
        sizes = [self._square(resolution)]
        for side in range(min_side, max_side + 1, self.step):
            longest_side = resolution * resolution // side // self.step * self.step
            other_side = min(longest_side, max_side)
            if other_side >= min_side:
                sizes.append(Size(side, other_side))
                sizes.append(Size(other_side, side))
        return sizes

    def _square(self, side: int) -> Size:
        """Return the largest square whose sides are at most `side`, and at least one step."""
        rounded_side = self._round_down(side)
        return Size(rounded_side, rounded_side)

    def _round_down(self, side: float) -> int:
        """Return the largest multiple of the step up to `side`, and at least one step."""
        num_steps = int(side) // self.step
        return self.step * max(1, num_steps)
