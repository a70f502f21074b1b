"""Grids of labeled images as a PNG."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MIN_SIDE = 128
"""Smaller images are enlarged by a whole number to at least this width in pixels."""
GAP, LABEL_WIDTH, CAPTION_HEIGHT, FONT_SIZE = 8, 72, 44, 13


def to_image(pixels: Tensor) -> Image.Image:
    """Convert pixels (3, H, W) in [-1, 1] to an image."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(array.numpy())


def grid_png(rows: dict[str, np.ndarray], captions: list[str]) -> bytes:
    """Return rows of images (N, H, W, 3) in [0, 1], each with its label, above the captions, as a
    PNG."""
    height, width = next(iter(rows.values())).shape[1:3]
    zoom = max(1, -(-MIN_SIDE // width))
    width, height = width * zoom, height * zoom
    font = ImageFont.load_default(size=FONT_SIZE)
    grid_width = LABEL_WIDTH + len(captions) * (width + GAP)
    grid_height = len(rows) * (height + GAP) + GAP + CAPTION_HEIGHT
    grid = Image.new("RGB", (grid_width, grid_height), "white")
    draw = ImageDraw.Draw(grid)
    lefts = [LABEL_WIDTH + column * (width + GAP) for column in range(len(captions))]
    for row, (label, images) in enumerate(rows.items()):
        top = GAP + row * (height + GAP)
        draw.text((GAP, top + height // 2), label, fill="black", font=font, anchor="lm")
        for left, array in zip(lefts, images, strict=True):
            image = Image.fromarray((array * 255).round().astype(np.uint8))
            grid.paste(image.resize((width, height), Image.Resampling.LANCZOS), (left, top))
    for left, caption in zip(lefts, captions, strict=True):
        text = wrapped_text(caption, width, font)
        draw.multiline_text((left, grid_height - CAPTION_HEIGHT), text, fill="black", font=font)
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG")
    return buffer.getvalue()


def wrapped_text(text: str, width: int, font: Any, max_lines: int = 2) -> str:
    """Break text at words into at most `max_lines` lines of `width` pixels; cut what does not fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = lines[:max_lines]
    if len(lines) > max_lines:
        shown[-1] += "..."
    return "\n".join(shortened_line(line, width, font) for line in shown)


def shortened_line(line: str, width: int, font: Any) -> str:
    """Cut a line to `width` pixels."""
    while font.getlength(line) > width:
        line = line[:-4] + "..."
    return line
