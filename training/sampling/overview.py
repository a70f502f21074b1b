"""One picture of all samples of a run: a row for each step, and a column for each prompt."""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import ImageOps

from common.atomic import write_file
from training.reporting.image_grid import grid_png
from training.sampling.files import IMAGE_SUFFIXES, is_of_prompt, last_frame, to_array
from training.sampling.prompts import SamplePrompt

MAX_SIDE = 256
"""Longest side of a sample in the picture, in pixels."""
MAX_ROWS = 12
"""Rows of the picture: the first step, and the newest ones."""


def write_overview(folder: Path, name: str, prompts: Sequence[SamplePrompt]) -> Path | None:
    """Write the picture of all steps whose samples are in a folder; return its path.

    Steps that lack a sample, or have one that cannot be read, are left out. Returns None if all are."""
    cell_size = largest_size(prompts)
    rows: dict[str, np.ndarray] = {}
    steps = shown_steps(folder, name, prompts)
    for step, paths in steps.items():
        with suppress(OSError, ValueError):
            cells = []
            for sample_path in paths:
                cell = thumbnail(sample_path, cell_size)
                cells.append(cell)
            rows[f"step {step}"] = np.stack(cells)
    if not rows:
        return None
    path = folder / f"{name}-steps.png"
    texts = [prompt.text for prompt in prompts]
    write_file(path, grid_png(rows, texts))
    return path


def shown_steps(folder: Path, name: str, prompts: Sequence[SamplePrompt]) -> dict[int, list[Path]]:
    """Return the files of each step that is shown, in the order of the prompts.

    Steps that lack the sample of a prompt are not."""
    files = files_by_step(folder, name)
    numbers = range(len(prompts))
    complete_steps = []
    for step in sorted(files):
        if has_prompts(files[step], prompts):
            complete_steps.append(step)
    num_hidden = max(0, len(complete_steps) - MAX_ROWS)
    del complete_steps[1 : 1 + num_hidden]
    shown = {}
    for step in complete_steps:
        shown[step] = [files[step][number] for number in numbers]
    return shown


def has_prompts(files: dict[int, Path], prompts: Sequence[SamplePrompt]) -> bool:
    """Return whether the samples of a step are those of the prompts. A resumed run may have others."""
    for number, prompt in enumerate(prompts):
        path = files.get(number)
        if path is None:
            return False
        if not is_of_prompt(path, prompt.text):
            return False
    return True


def files_by_step(folder: Path, name: str) -> dict[int, dict[int, Path]]:
    """Return the samples of each step in a folder, by their numbers.

    Other files are left out."""
    pattern = re.compile(rf"{re.escape(name)}-step(\d+)_(\d+)")
    files: dict[int, dict[int, Path]] = {}
    for path in folder.iterdir():
        match = pattern.fullmatch(path.stem)
        if match is None or path.suffix not in IMAGE_SUFFIXES:
            continue
        step = int(match[1])
        number = int(match[2])
        files.setdefault(step, {})
        files[step][number] = path
    return files


def largest_size(prompts: Sequence[SamplePrompt]) -> tuple[int, int]:
    """Return width and height of a cell, which all samples fit into."""
    width = 1
    height = 1
    for prompt in prompts:
        assert prompt.width is not None  # it is completed
        assert prompt.height is not None
        width = max(width, prompt.width)
        height = max(height, prompt.height)
    longest = max(width, height)
    factor = min(1, MAX_SIDE / longest)
    return (
        round(factor * width),
        round(factor * height),
    )


def thumbnail(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Return an image, or the last frame of a video, as (H, W, 3) in [0, 1].

    `size`: width and height. Samples of other proportions are padded with white."""
    padded = ImageOps.pad(last_frame(path), size, color="white")
    return to_array(padded)
