"""Two print styles, made from an emoji by image operations: the demos' training and validation
images."""

import numpy as np
from PIL import Image, ImageFilter

Color = tuple[int, int, int]

WORK_SIZE = 256
"""Side in pixels at which a picture is restyled; scaling down afterwards smooths its edges."""
SCREEN_INKS: tuple[Color, ...] = ((27, 42, 107), (232, 80, 91), (249, 213, 110), (255, 243, 220))
SCREEN_PAPER: Color = (124, 198, 195)
BLUEPRINT_COLORS: tuple[Color, Color, Color] = (244, 248, 255), (42, 98, 200), (23, 63, 143)
"""Line, inside and background."""
EDGE_THRESHOLD = 38
"""Difference of two neighboring colors, 0 to 255, from which on the blueprint draws a line."""


def screen_print(
    image: Image.Image, inks: tuple[Color, ...] = SCREEN_INKS, paper: Color = SCREEN_PAPER
) -> Image.Image:
    """Print an RGBA picture in a few inks, from dark to light, with an outline in the darkest one."""
    enlarged = enlarge(image)
    inside = alpha_mask(enlarged)
    grey = np.asarray(over_white(enlarged).convert("L"), dtype=np.float32)
    darkest, lightest = np.percentile(grey[inside], [2, 98])
    level = np.clip((grey - darkest) / max(lightest - darkest, 40), 0, 0.999)
    printed = np.asarray(inks, dtype=np.uint8)[(level * len(inks)).astype(int)]
    outlined = dilate(inside, 9)
    printed[outlined & ~inside] = inks[0]
    printed[~outlined] = paper
    return reduce(printed, image.size)


def blueprint(
    image: Image.Image, colors: tuple[Color, Color, Color] = BLUEPRINT_COLORS
) -> Image.Image:
    """Draw the edges of an RGBA picture as light lines on blue."""
    enlarged = enlarge(image)
    inside = alpha_mask(enlarged)
    lines = color_edges(over_white(enlarged)) | (dilate(inside, 5) & dilate(~inside, 5))
    line, filled, background = np.asarray(colors, dtype=np.uint8)
    drawn = np.where(inside[..., None], filled, background)
    drawn[lines] = line
    return reduce(drawn, image.size)


def color_edges(image: Image.Image) -> np.ndarray:
    """Boolean mask (H, W) of the places where an RGB picture changes its color; single dots are
    removed."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(2)), dtype=np.float32)
    across = np.abs(np.roll(pixels, -2, 1) - np.roll(pixels, 2, 1)).max(2)
    down = np.abs(np.roll(pixels, -2, 0) - np.roll(pixels, 2, 0)).max(2)
    edges = np.hypot(across, down) > EDGE_THRESHOLD
    return dilate(~dilate(~edges, 3), 3)


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
