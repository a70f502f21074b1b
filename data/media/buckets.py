"""Aspect buckets: sizes of about one area, and the way an image is scaled and cropped to the size
nearest its shape."""

import math
from dataclasses import dataclass

from data.config import DataConfig


@dataclass(frozen=True)
class Crop:
    """How pixels are made of an image: scaled to (scaled_width, scaled_height), of which a window
    is taken.

    Everything in pixels. `width`, `height`: of the image as it is shown, after its EXIF turn.
    """

    width: int
    height: int
    scaled_width: int
    scaled_height: int
    left: int
    top: int
    crop_width: int
    crop_height: int

    def name(self) -> str:
        """The same for what makes the same pixels of the same file."""
        return f"{self.scaled_width}x{self.scaled_height}+{self.left}+{self.top} {self.crop_width}x{self.crop_height}"


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
        return cls(
            config.resolution,
            config.bucket_step or step,
            config.bucket_min_side or config.resolution // 2,
            config.bucket_max_side or config.resolution * 2,
            config.upscale,
            only_square,
        )

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the bucket for an image: of all with the most area for their width, the one whose shape
        is nearest, on a logarithmic scale."""
        resolution = (
            self.resolution if self.upscale else min(self.resolution, math.isqrt(width * height))
        )
        if self.only_square:
            side = self.resolution if self.upscale else min(self.resolution, width, height)
            return (max(self.step, side // self.step * self.step),) * 2
        shape = math.log(width / height)
        return min(
            self._sizes(max(resolution, self.step)),
            key=lambda size: abs(math.log(size[0] / size[1]) - shape),
        )

    def _sizes(self, resolution: int) -> list[tuple[int, int]]:
        """All sizes, the square first, so that it wins a tie."""
        step, most, smaller = self.step, resolution * resolution, resolution / self.resolution
        least = max(step, int(self.min_side * smaller) // step * step)
        largest = max(least, int(self.max_side * smaller) // step * step)
        square = max(step, resolution // step * step)
        found = [(square, square)]
        for side in range(least, largest + 1, step):
            other = min(most // side // step * step, largest)
            if other >= least:
                found += [(side, other), (other, side)]
        return found

    def crop(self, width: int, height: int) -> Crop:
        """The image scaled until it just covers its bucket, and the window in its middle."""
        crop_width, crop_height = self.size(width, height)
        scale = max(crop_width / width, crop_height / height)
        scaled_width, scaled_height = (
            max(crop_width, round(width * scale)),
            max(crop_height, round(height * scale)),
        )
        left, top = (scaled_width - crop_width) // 2, (scaled_height - crop_height) // 2
        return Crop(width, height, scaled_width, scaled_height, left, top, crop_width, crop_height)
