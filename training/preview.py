"""Images before and after training on the same prompts and the same noise, drawn by diffusers' own pipeline."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

from lora_algos.attach import Adapted
from models.base import ModelFamily
from training.config import PreviewConfig
from training.distributed.failures import explained

SMALLEST = 128  # tiny images are enlarged to this in the grid


def draw(pipeline: Any, prompt: str, number: int, config: PreviewConfig, options: dict[str, Any]) -> np.ndarray:
    """One image (H, W, 3) in [0, 1]; each prompt has its own noise, the same in every call. `options`: size and
    guidance, as the family's pipeline calls them."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    mixed = any(p.dtype == torch.bfloat16 for part in parts for p in part.parameters())  # then they meet others in fp32
    with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=mixed):
        result = pipeline(
            prompt=prompt,  # which is not the first argument of every pipeline
            num_inference_steps=config.num_inference_steps,
            generator=torch.Generator().manual_seed((config.seed + number) % 2**64),
            output_type="np",
            **options,
        )
    return result.images[0] if hasattr(result, "images") else result.frames[0][-1]  # the first may have been given


@torch.no_grad()
def first_frame(family: ModelFamily, latents: Tensor, pipeline: Any, side: int) -> Image.Image:
    """Of a clip with these raw latents (C, F, h, w), its middle as a square."""
    pixels = family.decode_media(pipeline, latents[None, :, :1].to(pipeline.device))[0]
    return ImageOps.fit(as_picture(pixels.cpu()), (side, side))


def as_picture(pixels: Tensor) -> Image.Image:
    """Of pixels (3, H, W) in [-1, 1]."""
    return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())


class Attempt:
    """Draws as `draw` of what `load` gives does, until something goes wrong: then nothing more, for the `error`.

    A preview is the least of what a run is for, and may need memory that training did not.
    """

    def __init__(self, load: Callable[[], Any], draw: Callable[..., np.ndarray]):
        self.load, self.draw = load, draw
        self.pipeline: Any = None
        self.error: str | None = None

    def __call__(self, prompt: str, number: int) -> np.ndarray | None:
        if self.error is None:
            try:
                self.pipeline = self.pipeline or self.load()
                return self.draw(self.pipeline, prompt, number)
            except Exception as error:
                self.error, self.pipeline = explained(error), None
        return None


def images_of(
    adapted: Adapted,
    weights: list[dict],
    prompts: dict[int, str],
    rounds: int,
    draw_one: Callable[[str, int], Any],
    leaving: Callable[[], bool],
) -> list[dict[int, np.ndarray]] | None:
    """For each of `weights` the images of `prompts`, by number; None if it was left, on all ranks.

    All ranks ask as often whether they are `leaving`, `rounds` times. The adapter has its own weights again afterwards.
    """
    trained, numbers = adapted.state_dict(), list(prompts)
    adapted.model.eval()
    found: list[dict[int, np.ndarray]] = []
    try:
        for state in weights:
            adapted.load_state_dict(state)
            found.append({})
            for i in range(rounds):
                if leaving():
                    return None
                if i < len(numbers):
                    found[-1][numbers[i]] = draw_one(prompts[numbers[i]], numbers[i])
    finally:
        adapted.load_state_dict(trained)
        adapted.model.train()
    return found


def grid_png(rows: dict[str, np.ndarray], captions: list[str]) -> bytes:
    """Labelled rows of images (N, H, W, 3) in [0, 1] over their captions, as a PNG."""
    height, width = next(iter(rows.values())).shape[1:3]
    zoom = max(1, -(-SMALLEST // width))
    width, height, gap, left, bottom = width * zoom, height * zoom, 8, 72, 44
    font = ImageFont.load_default(size=13)
    size = (left + len(captions) * (width + gap), len(rows) * (height + gap) + gap + bottom)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for r, (label, images) in enumerate(rows.items()):
        y = gap + r * (height + gap)
        pen.text((gap, y + height // 2), label, fill="black", font=font, anchor="lm")
        for c, image in enumerate(images):
            picture = Image.fromarray((image * 255).round().astype(np.uint8))
            sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left + c * (width + gap), y))
    for c, caption in enumerate(captions):
        text = wrapped(caption, width, font)
        pen.multiline_text((left + c * (width + gap), size[1] - bottom), text, fill="black", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def wrapped(text: str, width: int, font: Any, lines: int = 2) -> str:
    """`text` broken at words into at most `lines` lines that fit `width` pixels; what is over is cut."""
    result = [""]
    for word in text.split():
        longer = f"{result[-1]} {word}".strip()
        if font.getlength(longer) <= width or not result[-1]:
            result[-1] = longer
        else:
            result.append(word)
    kept = result[:lines]
    if len(result) > lines:
        kept[-1] += "..."
    while any(font.getlength(line) > width for line in kept):
        kept = [line if font.getlength(line) <= width else line[:-4] + "..." for line in kept]
    return "\n".join(kept)
