"""Two kinds of print, made from an emoji by image operations.

The demos' styles are screen prints; the autoencoder saw blueprints too. Widths are in pixels of a
picture of `WORK_SIZE`, a quarter of a pixel of a 64x64 image.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

Color = tuple[int, int, int]

WORK_SIZE = 256
"""Side in pixels at which a picture is restyled; scaling down afterwards smooths its edges."""


@dataclass(frozen=True)
class ScreenPrint:
    """Prints an RGBA picture in a few inks, with a border around it."""

    inks: tuple[Color, ...] = ((27, 42, 107), (232, 80, 91), (249, 213, 110), (255, 243, 220))
    """From dark to light."""
    paper: Color = (124, 198, 195)
    border: Color = (255, 243, 220)
    border_width: int = 21
    """Width of the border's inner and outer half together."""
    smoothing: int = 13
    """Size of the median filter, which removes details that are finer."""
    thresholds: tuple[int, ...] | None = (80, 155, 215)
    """Brightness, 0 to 255, from which on the next ink is used. None: equal parts of the picture's
    own range."""

    def __call__(self, image: Image.Image) -> Image.Image:
        enlarged = enlarge(image)
        inside = alpha_mask(enlarged)
        smooth = over_white(enlarged).convert("L").filter(ImageFilter.MedianFilter(self.smoothing))
        grey = np.asarray(smooth, dtype=np.float32)
        printed = np.asarray(self.inks, dtype=np.uint8)[self.ink_numbers(grey, inside)]
        bordered = dilate(inside, self.border_width)
        printed[bordered & ~inside] = self.border
        printed[~bordered] = self.paper
        return reduce(printed, image.size)

    def ink_numbers(self, grey: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """Return the number of each pixel's ink. `inside`: mask of the picture in the image."""
        if self.thresholds is not None:
            return np.digitize(grey, self.thresholds)
        darkest, lightest = np.percentile(grey[inside], [2, 98])
        level = np.clip((grey - darkest) / max(lightest - darkest, 40), 0, 0.999)
        return (level * len(self.inks)).astype(int)


@dataclass(frozen=True)
class Blueprint:
    """Draws the edges of an RGBA picture as light lines on blue."""

    line: Color = (244, 248, 255)
    inside: Color = (42, 98, 200)
    background: Color = (23, 63, 143)
    outline_width: int = 7
    line_width: int = 5
    """Width of the lines inside the outline."""
    blur: int = 3
    """Radius of the blur before edges are looked for."""
    threshold: int = 34
    """Difference of two neighboring colors, 0 to 255, from which on a line is drawn."""

    def __call__(self, image: Image.Image) -> Image.Image:
        enlarged = enlarge(image)
        inside = alpha_mask(enlarged)
        outline = dilate(inside, self.outline_width) & dilate(~inside, self.outline_width)
        lines = outline | self.color_edges(over_white(enlarged))
        drawn = np.where(inside[..., None], np.uint8(self.inside), np.uint8(self.background))
        drawn[lines] = self.line
        return reduce(drawn, image.size)

    def color_edges(self, image: Image.Image) -> np.ndarray:
        """Boolean mask (H, W) of the places where an RGB picture changes its color; single dots are
        removed."""
        blurred = image.filter(ImageFilter.GaussianBlur(self.blur))
        pixels = np.asarray(blurred, dtype=np.float32)
        across = np.abs(np.roll(pixels, -2, 1) - np.roll(pixels, 2, 1)).max(2)
        down = np.abs(np.roll(pixels, -2, 0) - np.roll(pixels, 2, 0)).max(2)
        edges = np.hypot(across, down) > self.threshold
        without_dots = ~dilate(~edges, 3)
        return dilate(without_dots, self.line_width)


def dilate(mask: np.ndarray, size: int) -> np.ndarray:
    """Boolean mask (H, W) grown by a square of `size` pixels."""
    return (
        np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(size)))
        > 0
    )


def alpha_mask(image: Image.Image) -> np.ndarray:
    """Boolean mask (H, W) of the opaque pixels of an RGBA picture."""
    return np.asarray(image.getchannel("A")) > 128


def over_white(image: Image.Image) -> Image.Image:
    """Return an RGBA picture on a white background, as RGB."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def enlarge(image: Image.Image) -> Image.Image:
    """Scale a picture up to the size at which it is restyled."""
    return image.convert("RGBA").resize((WORK_SIZE, WORK_SIZE), Image.Resampling.BICUBIC)


def reduce(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Scale an RGB array (H, W, 3) down to a picture of `size` pixels."""
    return Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.LANCZOS)
