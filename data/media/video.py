"""Turns the content of a video file, or of an animated GIF or WebP, into pixels; the one place
where videos are opened.

Frame k of a clip is the picture that is shown k / fps seconds after the clip's start, whatever the
file's own rate.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import GifImagePlugin, Image, WebPImagePlugin
from torch import Tensor

from common.errors import DataError
from data.config import DataConfig
from data.media import images
from data.media.buckets import Crop

EXTENSIONS = {".mp4", ".webm", ".mov", ".mkv"}
LATE = 0.05  # of a frame: how much the times in a file may be rounded
SHORTEST, USUAL = (
    0.011,
    0.1,
)  # seconds: what a GIF shows for less has the usual time in all browsers
Shown = tuple[
    float, float, Callable[[], Image.Image]
]  # a frame's first second, how long it is shown, and its picture


@dataclass(frozen=True)
class Facts:
    """Size in pixels of a video as it is shown, and its length in seconds."""

    width: int
    height: int
    seconds: float


@dataclass(frozen=True)
class Clip:
    """What is taken of a video: `frames`, 1 / `fps` seconds apart, from `start` on (seconds)."""

    start: float
    frames: int
    fps: float

    @classmethod
    def of(cls, fields: list[float]) -> "Clip":
        """From a cell of tables.ROWS."""
        start, frames, fps = fields
        return cls(start, int(frames), fps)

    def name(self) -> str:
        """The same for what takes the same frames."""
        return f"{self.start:.6f}+{self.frames} at {self.fps:g}"


@dataclass(frozen=True)
class Clips:
    """Which clips are taken of a video: of up to `frames`, one more than a multiple of `step`; from its start, or if
    `spread`, as many as fit without sharing frames, spread evenly."""

    frames: int
    fps: float
    step: int
    spread: bool

    @classmethod
    def wanted(cls, config: DataConfig, step: int, fps: float) -> "Clips":
        """As `config` says, for a model whose frames are one more than a multiple of `step`, `fps` of them a second.
        Raises DataError for a number of frames that the model does not take."""
        if (config.frames - 1) % step:
            least = (config.frames - 1) // step * step + 1
            raise DataError(
                f"--data.frames {config.frames}: this model takes one more than a multiple of {step}, "
                f"such as {least} or {least + step}"
            )
        return cls(config.frames, config.fps or fps, step, config.video_clips == "spread")

    def of(self, seconds: float) -> list[Clip]:
        """Those of a video of that length; of one that is too short, the most frames it has that
        the model takes."""
        there = max(1, int(seconds * self.fps + LATE))
        if there < self.frames:
            return [Clip(0.0, 1 + (there - 1) // self.step * self.step, self.fps)]
        count = there // self.frames if self.spread else 1
        apart = (there - self.frames) // max(1, count - 1) if count > 1 else 0
        return [Clip(number * apart / self.fps, self.frames, self.fps) for number in range(count)]


def is_video(content: bytes) -> bool:
    """Whether a file is more than one picture, or nothing that an image is."""
    reader = images.reader_of(content)
    if reader not in (GifImagePlugin.GifImageFile, WebPImagePlugin.WebPImageFile):
        return bool(content) and reader is None
    try:
        with images.under_our_limit(lambda: reader(io.BytesIO(content))) as image:
            return getattr(image, "n_frames", 1) > 1
    except Exception:  # what is damaged is told when it is looked at as an image
        return False


def check(content: bytes) -> Facts:
    """Decodes a video once; raises DataError saying why it cannot be used."""
    size, end = (0, 0), 0.0
    for number, (start, length, picture) in enumerate(shown(content)):
        if not number:
            size = picture().size
            if size[0] * size[1] > images.MAX_PIXELS:
                raise DataError(
                    f"{size[0]}x{size[1]} pixels; more than {images.MAX_PIXELS} are taken for an attack"
                )
        end = start + length
    if not end:
        raise DataError("a video without pictures")
    return Facts(*size, end)


def pixels(content: bytes, crop: Crop, clip: Clip, background: str, flip: bool = False) -> Tensor:
    """A clip's colors, (3, frames, crop_height, crop_width) float32 in [-1, 1]; of one frame (3,
    height, width).

    Otherwise as images.pixels.
    """
    times = [clip.start + number / clip.fps + LATE / clip.fps for number in range(clip.frames)]
    found: list[Tensor] = []
    last: Callable[[], Image.Image] | None = None

    def take(until: float) -> None:
        """The last frame's pixels for all times before the next one's."""
        made = None
        while last is not None and len(found) < len(times) and times[len(found)] < until:
            made = (
                images.scaled(images.over(last(), background), crop, flip) if made is None else made
            )
            found.append(made)

    for start, _, picture in shown(content):
        take(start)
        last = picture
        if len(found) == len(times):
            break
    take(float("inf"))
    if not found:
        raise DataError("a video without pictures")
    return torch.stack(found, 1) if clip.frames > 1 else found[0]


def frames_of(rows: pa.Table) -> np.ndarray:
    """Frames of each row of tables.ROWS that is a clip; 0 of images, and of latents that are taken
    as they are."""
    clips = rows.column("clip")
    if clips.null_count == len(clips):
        return np.zeros(len(clips), np.int64)
    return np.array([int(clip[1]) if clip else 0 for clip in clips.to_pylist()], np.int64)


def shown(content: bytes) -> Iterator[Shown]:
    """The frames of a file in their order."""
    return in_container(content) if images.reader_of(content) is None else in_animation(content)


def in_animation(content: bytes) -> Iterator[Shown]:
    """Those of an animated GIF or WebP."""
    reader: Any = images.reader_of(content)
    start = 0.0
    try:
        with images.under_our_limit(lambda: reader(io.BytesIO(content))) as image:
            for number in range(image.n_frames):
                image.seek(number)
                image.load()
                length = image.info.get("duration", 0) / 1000
                length = length if length >= SHORTEST else USUAL
                yield (
                    start,
                    length,
                    image.convert("RGBA").copy,
                )  # now: the reader goes on to the next
                start += length
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        raise DataError(f"damaged ({error or type(error).__name__})") from error


def in_container(content: bytes) -> Iterator[Shown]:
    """Those of a video file."""
    try:
        import av  # an extra, and a slow import
    except ImportError as error:
        raise DataError(
            "videos are read with PyAV, which is not installed: pip install 'train-lora[video]'"
        ) from error
    try:
        with av.open(io.BytesIO(content), "r") as container:
            if not container.streams.video:
                raise DataError("a file without a video")
            stream, first = container.streams.video[0], None
            usual = float(1 / (stream.average_rate or 25))
            for number, frame in enumerate(container.decode(stream)):
                time = number * usual if frame.time is None else frame.time
                first = time if first is None else first
                length = (
                    float(frame.duration * frame.time_base)
                    if frame.duration and frame.time_base
                    else usual
                )
                yield time - first, length, partial(upright, frame)
    except av.FFmpegError as error:
        raise DataError(
            f"neither an image nor a video that can be read ({error.strerror or error})"
        ) from error


def upright(frame: Any) -> Image.Image:
    """A frame in RGB, turned as the file says (phones write it so)."""
    picture = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
