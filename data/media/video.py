"""Pixels from the content of video files, and of animated GIF and WebP files.

No other file opens videos. Frame k of a clip is the picture shown k / fps seconds after the start
of the clip. The frame rate of the file does not matter.
"""

import io
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import GifImagePlugin, Image, WebPImagePlugin
from torch import Tensor

from common.errors import DataError
from data.config import DataConfig
from data.media import images
from data.media.buckets import Crop
from data.store.tables import Float64

EXTENSIONS = {".mp4", ".webm", ".mov", ".mkv"}
TIME_TOLERANCE = 0.05
"""Fraction of a frame by which the times in a file may be rounded."""
MIN_GIF_SECONDS, USUAL_GIF_SECONDS = 0.011, 0.1
"""Browsers show frames with a shorter time than the first for the second."""
USUAL_FPS = 25
ANIMATION_READERS = (GifImagePlugin.GifImageFile, WebPImagePlugin.WebPImageFile)


@dataclass(frozen=True)
class VideoFacts:
    """Size in pixels of a video after its rotation, and its length in seconds."""

    width: int
    height: int
    seconds: float


@dataclass(frozen=True)
class Clip:
    """The frames of a video that are used: from `start` (seconds) on, 1 / `fps` seconds apart."""

    start: Float64
    frames: int
    fps: Float64

    def describe(self) -> str:
        """Return a text that is equal for clips with the same frames."""
        return f"{self.start:.6f}+{self.frames} at {self.fps:g}"

    def times(self) -> list[float]:
        """Return the times of the frames, in seconds, with a tolerance for rounded times."""
        times = []
        for number in range(self.frames):
            time = self.start + number / self.fps
            times.append(time + TIME_TOLERANCE / self.fps)
        return times


@dataclass(frozen=True)
class ClipSampling:
    """The choice of clips of a video.

    Clips have up to `frames` frames, one more than a multiple of `step`. One clip is taken from the
    start of a video, or if `spread`, as many as fit without sharing frames, evenly spaced."""

    frames: int
    fps: float
    step: int
    spread: bool

    @classmethod
    def of(cls, config: DataConfig, step: int, fps: float) -> "ClipSampling":
        """Return the configured choice.

        `step`, `fps`: the model takes one more than a multiple of `step` frames, and its videos
        have this rate. Raises DataError for a number of frames that the model does not take."""
        if (config.frames - 1) % step:
            smaller = (config.frames - 1) // step * step + 1
            raise DataError(
                f"--data.frames {config.frames}: this model takes one more than a multiple of "
                f"{step} frames. Use {smaller} or {smaller + step}"
            )
        return cls(
            frames=config.frames,
            fps=config.fps or fps,
            step=step,
            spread=config.video_clips == "spread",
        )

    def clips(self, seconds: float) -> list[Clip]:
        """Return the clips of a video of this length.

        A video that is too short gives one clip, as long as the model supports."""
        num_frames = max(1, int(seconds * self.fps + TIME_TOLERANCE))
        if num_frames < self.frames:
            num_steps = (num_frames - 1) // self.step
            return [Clip(0.0, 1 + num_steps * self.step, self.fps)]
        num_clips = 1
        if self.spread:
            num_clips = num_frames // self.frames
        distance = (num_frames - self.frames) // max(1, num_clips - 1)
        clips = []
        for number in range(num_clips):
            start = number * distance / self.fps
            clips.append(Clip(start, self.frames, self.fps))
        return clips


class ShownFrame(NamedTuple):
    """A frame of a file: when it is shown, for how long, and a function for its picture."""

    start: float
    seconds: float
    picture: Callable[[], Image.Image]


def is_video(content: bytes) -> bool:
    """Return whether a file has more than one picture, or is not in an image format."""
    reader = images.reader_of(content)
    if reader not in ANIMATION_READERS:
        return bool(content) and reader is None
    try:
        with images.with_pixel_limit(lambda: reader(io.BytesIO(content))) as image:
            return getattr(image, "n_frames", 1) > 1
    except Exception:  # its check as an image reports the damage
        return False


def check(content: bytes) -> VideoFacts:
    """Decode a video once. Raises DataError with the reason why it cannot be used."""
    width, height = 0, 0
    end = 0.0
    for number, frame in enumerate(decode_frames(content)):
        if number == 0:
            width, height = frame.picture().size
            images.check_num_pixels(width, height)
        end = frame.start + frame.seconds
    if not end:
        raise DataError("the video has no frames")
    return VideoFacts(width, height, end)


def pixels(content: bytes, crop: Crop, clip: Clip, background: str, flip: bool = False) -> Tensor:
    """Return a clip's colors (3, frames, crop_height, crop_width), as images.pixels does.

    A clip of one frame has no dimension of frames."""
    times = clip.times()
    frames: list[Tensor] = []
    for picture, end in shown_pictures(content):
        num_new = bisect_left(times, end) - len(frames)
        if num_new > 0:
            image = images.paste_over(picture(), background)
            frames += [images.scale(image, crop, flip)] * num_new
        if len(frames) == len(times):
            break
    if not frames:
        raise DataError("the video has no frames")
    if clip.frames == 1:
        return frames[0]
    return torch.stack(frames, dim=1)


def shown_pictures(content: bytes) -> Iterator[tuple[Callable[[], Image.Image], float]]:
    """Yield the picture of each frame, and the time when the next frame replaces it."""
    picture: Callable[[], Image.Image] | None = None
    for frame in decode_frames(content):
        if picture is not None:
            yield picture, frame.start
        picture = frame.picture
    if picture is not None:
        yield picture, float("inf")


def decode_frames(content: bytes) -> Iterator[ShownFrame]:
    """Yield the frames of a file in their order."""
    if images.reader_of(content) is None:
        return container_frames(content)
    return animation_frames(content)


def animation_frames(content: bytes) -> Iterator[ShownFrame]:
    """Yield the frames of an animated GIF or WebP."""
    reader: Any = images.reader_of(content)
    start = 0.0
    try:
        with images.with_pixel_limit(lambda: reader(io.BytesIO(content))) as image:
            for number in range(image.n_frames):
                image.seek(number)
                image.load()
                seconds = image.info.get("duration", 0) / 1000
                if seconds < MIN_GIF_SECONDS:
                    seconds = USUAL_GIF_SECONDS
                frame = image.convert("RGBA")  # a copy, because the reader moves to the next frame
                yield ShownFrame(start, seconds, frame.copy)
                start += seconds
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        reason = str(error) or type(error).__name__
        raise DataError(f"damaged ({reason})") from error


def container_frames(content: bytes) -> Iterator[ShownFrame]:
    """Yield the frames of a video file."""
    try:
        import av  # optional, and a slow import
    except ImportError as error:
        raise DataError(
            "videos are read with PyAV, which is not installed: pip install 'train-lora[video]'"
        ) from error
    try:
        with av.open(io.BytesIO(content), "r") as container:
            if not container.streams.video:
                raise DataError("the file has no video stream")
            stream = container.streams.video[0]
            usual_seconds = float(1 / (stream.average_rate or USUAL_FPS))
            first_time: float | None = None
            for number, frame in enumerate(container.decode(stream)):
                time = frame.time
                if time is None:
                    time = number * usual_seconds
                if first_time is None:
                    first_time = time
                seconds = usual_seconds
                if frame.duration and frame.time_base:
                    seconds = float(frame.duration * frame.time_base)
                yield ShownFrame(time - first_time, seconds, partial(upright_picture, frame))
    except av.FFmpegError as error:
        reason = error.strerror or error
        raise DataError(f"neither an image nor a readable video ({reason})") from error


def upright_picture(frame: Any) -> Image.Image:
    """Return a frame in RGB, rotated as the file says, as the files of phones do."""
    picture = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
