"""The files of samples: images or videos with their options, and a sheet of each step."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.atomic import write_file
from data.media.pictures import to_levels
from training.reporting.image_grid import grid_png
from training.run_folder import SAMPLES_FOLDER, STEP_SUFFIX
from training.sampling.control_images import with_control_row
from training.sampling.prompts import SamplePrompt
from training.sampling.samples import Samples

SHEET = "sheet"
IMAGE_SUFFIXES = (".png", ".webp")
"""Endings of samples: images, and videos."""


def sample_name(name: str, step: int, number: int | str) -> str:
    """Return the name of a sample's file, without its ending."""
    text = number if isinstance(number, str) else f"{number:02d}"
    return f"{name}{STEP_SUFFIX.format(step)}_{text}"


def sheet_path(folder: Path, name: str, step: int) -> Path:
    """Return the path of the sheet with all samples of a step. It is written last."""
    return folder / SAMPLES_FOLDER / f"{sample_name(name, step, SHEET)}.png"


def grid_path(folder: Path, name: str, number: int) -> Path:
    """Return the path of a prompt's grid. `name`: of the adapter."""
    return folder / f"{name}-grid_{number:02d}.png"


def prompt_of_file(path: Path) -> str | None:
    """Return the prompt of a sample, from its metadata; None if the file has none."""
    try:
        with Image.open(path) as image:
            parameters = image.info.get("parameters")
    except Exception:  # damaged files raise many kinds of errors
        return None
    if not isinstance(parameters, str):
        return None
    return parameters.split("\n")[0]


def is_of_prompt(path: Path, text: str) -> bool:
    """Return whether a sample has a prompt, as far as its metadata tell: those of videos do not."""
    drawn_text = prompt_of_file(path)
    first_line = text.split("\n")[0]
    return drawn_text in (None, first_line)


def read_still(path: Path) -> np.ndarray:
    """Return a sample, or the last frame of a video, as (H, W, 3) in [0, 1]."""
    return to_array(last_frame(path))


def last_frame(path: Path) -> Image.Image:
    """Return an image, or the last frame of a video. The first frame may be the input."""
    with Image.open(path) as image:
        num_frames = getattr(image, "n_frames", 1)
        image.seek(num_frames - 1)
        return image.convert("RGB")


def to_array(image: Image.Image) -> np.ndarray:
    """Return an image as (H, W, 3) in [0, 1]."""
    levels = np.asarray(image, np.float32)
    return levels / 255


def write_samples(
    samples: Samples, folder: Path, name: str, step: int, fps: float, workflows: Sequence[str]
) -> Path:
    """Write the samples of one step, and then their sheet; return the path of the sheet.

    `folder`: output_dir. `name`: of the adapter. `fps`: frames per second of videos. `workflows`:
    for ComfyUI's editor, one of each sample, which may be empty."""
    (images,) = samples.images.values()
    path = sheet_path(folder, name, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    title = name + STEP_SUFFIX.format(step) if step else ""
    rows = zip(samples.prompts, images, workflows, strict=True)
    for number, (prompt, frames, workflow) in enumerate(rows):
        base_path = path.with_name(sample_name(name, step, number))
        texts = {"parameters": parameters_text(prompt, title), "workflow": workflow}
        write_sample(base_path, frames, texts, fps)
    captions = [prompt.text for prompt in samples.prompts]
    sheet = with_control_row({f"step {step}": padded_stills(images)}, samples.controls)
    write_file(path, grid_png(sheet, captions))
    return path


def write_sample(path: Path, frames: np.ndarray, texts: dict[str, str], fps: float) -> None:
    """Write an image as a PNG, and a video as an animated WebP and, with the package av, an MP4.

    `path`: without its ending. `frames`: (F, H, W, 3) in [0, 1]. `texts`: metadata of a PNG; empty
    ones are left out."""
    images = [Image.fromarray(to_levels(frame)) for frame in frames]
    if len(images) == 1:
        info = PngInfo()
        for key, text in texts.items():
            if text:
                info.add_text(key, text)
        buffer = io.BytesIO()
        images[0].save(buffer, "PNG", pnginfo=info)
        write_file(with_ending(path, ".png"), buffer.getvalue())
        return
    write_file(with_ending(path, ".webp"), webp_bytes(images, fps))
    video = mp4_bytes(images, fps)
    if video is not None:
        write_file(with_ending(path, ".mp4"), video)


def with_ending(path: Path, ending: str) -> Path:
    """Return a path with a further ending. The name of an adapter may contain dots."""
    return path.with_name(path.name + ending)


def parameters_text(prompt: SamplePrompt, title: str) -> str:
    """Return the options of an image as A1111's web UI writes them into PNG files.

    `title`: of the adapter; empty for the base model."""
    lines = [prompt.text]
    if prompt.negative:
        lines.append(f"Negative prompt: {prompt.negative}")
    facts: dict[str, object] = {
        "Steps": prompt.num_inference_steps,
        "CFG scale": prompt.guidance_scale,
        "Seed": prompt.seed,
        "Size": f"{prompt.width}x{prompt.height}",
    }
    if title:
        facts["Lora"] = title
    if prompt.controls:
        facts["Control images"] = " ".join(Path(path).name for path in prompt.controls)
    if prompt.strength is not None and prompt.strength != 1:
        facts["Lora strength"] = f"{prompt.strength:g}"
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items()))
    return "\n".join(lines)


def webp_bytes(images: Sequence[Image.Image], fps: float) -> bytes:
    """Return images as an animated WebP that repeats."""
    buffer = io.BytesIO()
    milliseconds = round(1000 / fps)
    images[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=images[1:],
        duration=milliseconds,
        loop=0,
        quality=85,
    )
    return buffer.getvalue()


def mp4_bytes(images: Sequence[Image.Image], fps: float) -> bytes | None:
    """Return images as an MP4; None without the package av, or if it cannot encode H.264."""
    try:
        import av
    except ImportError:
        return None
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=round(fps))
            stream.width, stream.height = images[0].size
            stream.pix_fmt = "yuv420p"
            for image in images:
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
            container.mux(stream.encode())
    except (av.FFmpegError, ValueError):
        return None
    return buffer.getvalue()


def padded_stills(videos: Sequence[np.ndarray]) -> np.ndarray:
    """Return the last frames (N, H, W, 3), padded with white to the largest size.

    The first frame of a video may be the input."""
    stills = [frames[-1] for frames in videos]
    height = max(still.shape[0] for still in stills)
    width = max(still.shape[1] for still in stills)
    padded = np.ones((len(stills), height, width, 3), np.float32)
    for row, still in zip(padded, stills, strict=True):
        row[: still.shape[0], : still.shape[1]] = still
    return padded
