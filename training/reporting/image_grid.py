"""Grids of labeled images as a PNG."""

import io
import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.media.pictures import to_levels

MIN_SIDE = 128
"""Smaller images are enlarged by a whole number to at least this width in pixels."""
GAP, LABEL_WIDTH, CAPTION_HEIGHT, FONT_SIZE = 8, 72, 44, 13


def grid_png(rows: dict[str, np.ndarray], captions: list[str]) -> bytes:
    """Return rows of images (N, H, W, 3) in [0, 1], each with its label, above the captions, as a
    PNG."""
    first_images = next(iter(rows.values()))
    _, height, width, _ = first_images.shape
    zoom = max(1, math.ceil(MIN_SIDE / width))
    width *= zoom
    height *= zoom
    column_width = width + GAP
    row_height = height + GAP
    grid_width = LABEL_WIDTH + len(captions) * column_width
    grid_height = GAP + len(rows) * row_height + CAPTION_HEIGHT
    grid = Image.new("RGB", (grid_width, grid_height), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=FONT_SIZE)
    lefts = range(LABEL_WIDTH, grid_width, column_width)
    top = GAP
    for label, images in rows.items():
        label_position = (GAP, top + height // 2)
        draw.text(label_position, label, fill="black", font=font, anchor="lm")
        for left, array in zip(lefts, images, strict=True):
            image = enlarged(array, (width, height))
            grid.paste(image, (left, top))
        top += row_height
    for left, caption in zip(lefts, captions, strict=True):
        text = wrapped_text(caption, width, font)
        draw.multiline_text((left, top), text, fill="black", font=font)
    return png_bytes(grid)


def png_bytes(image: Image.Image) -> bytes:
    """Return an image as the content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def enlarged(array: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Return an array (H, W, 3) in [0, 1] as an image of `size`."""
    image = Image.fromarray(to_levels(array))
    return image.resize(size, Image.Resampling.LANCZOS)


def wrapped_text(text: str, width: int, font: Any, max_lines: int = 2) -> str:
    """Break text at words into at most `max_lines` lines of `width` pixels; cut what does not fit."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    lines.append(line)
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        lines[-1] += "..."
    short_lines = [shortened_line(line, width, font) for line in lines]
    return "\n".join(short_lines)


def shortened_line(line: str, width: int, font: Any) -> str:
    """Cut a line to `width` pixels."""
    while font.getlength(line) > width:
        line = line[:-4] + "..."
    return line
