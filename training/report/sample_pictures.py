"""Pictures of a run's samples, small enough to be inside of its report."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from data.thumbnails import spread_evenly
from training.report.data_pictures import data_uri, picture_of_caption
from training.report.run_files import RunFiles
from training.run_folder import SAMPLES_FOLDER
from training.sampling.files import grid_path, is_of_prompt, last_frame, prompt_of_file

MAX_SIDE = 320
"""Longer side of a picture in pixels."""
GRID_SIDE = 1200
"""The same for a grid of steps and strengths."""
MAX_GRIDS = 12
MAX_PICTURES = 200
"""Pictures inside of one report. With more, steps in the middle are left out."""


@dataclass
class PictureCache:
    """Small pictures by file. A report is written again and again, and most of its pictures stay."""

    pictures: dict[tuple[Path, int], str] = field(default_factory=dict)

    def picture(self, path: Path, max_side: int = MAX_SIDE) -> str | None:
        """Return the small picture of an image, or of the last frame of a video, as a data URI.

        `max_side`: in pixels. Returns None if the file is not readable."""
        try:
            key = (path, path.stat().st_mtime_ns)
            if key not in self.pictures:
                self.pictures[key] = small_picture(path, max_side)
            return self.pictures[key]
        except Exception:  # damaged files raise many kinds of errors
            return None


@dataclass(frozen=True)
class SampledPrompt:
    """A prompt, and its pictures at each step."""

    text: str
    details: str
    """Size, seed and so on."""
    original: str | None
    """The picture of the training data whose caption the prompt is."""
    pictures: list[str | None]
    links: list[str]
    """Path of the original image of each picture, from the folder of the report."""

    @property
    def first(self) -> int:
        """Return the index of the first picture that exists, or 0."""
        for index, picture in enumerate(self.pictures):
            if picture is not None:
                return index
        return 0


@dataclass(frozen=True)
class GridPicture:
    """A grid of steps and strengths of one prompt."""

    text: str
    """The prompt."""
    picture: str
    link: str


@dataclass(frozen=True)
class SampleSeries:
    """All samples of a run that its report shows."""

    steps: list[int]
    prompts: list[SampledPrompt]
    num_hidden: int
    """Steps that are not shown."""
    grids: list[GridPicture]
    """Grids of steps and strengths, in the order of the prompts."""


def small_picture(path: Path, max_side: int) -> str:
    """Return the small picture of a file as a data URI."""
    colors = last_frame(path)
    colors.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return data_uri(colors)


def sample_series(run: RunFiles, cache: PictureCache, folder: Path) -> SampleSeries:
    """Return the samples of a run. `folder`: of the report, for its links."""
    numbers = {number for files in run.samples.values() for number in files}
    num_prompts = max(numbers, default=-1) + 1
    run_prompts = run.facts.get("prompts", [])
    if run_prompts:  # samples of earlier prompts may be left
        num_prompts = min(num_prompts, len(run_prompts))
    steps = shown_steps([*run.samples], num_prompts)
    prompts = []
    for number in range(num_prompts):
        paths = [run.samples[step].get(number) for step in steps]
        prompts.append(sampled_prompt(run, number, paths, cache, folder))
    num_hidden = len(run.samples) - len(steps)
    grids = grid_pictures(run, cache, folder)
    return SampleSeries(steps, prompts, num_hidden, grids)


def grid_pictures(run: RunFiles, cache: PictureCache, folder: Path) -> list[GridPicture]:
    """Return the first grids of steps and strengths. `folder`: of the report, for its links."""
    samples_folder = run.folder / SAMPLES_FOLDER
    grids = []
    for number in range(MAX_GRIDS):
        path = grid_path(samples_folder, run.adapter_name, number)
        picture = cache.picture(path, GRID_SIDE)
        if picture is not None:
            grid = GridPicture(prompt_text(run, number), picture, link(path, folder))
            grids.append(grid)
    return grids


def prompt_text(run: RunFiles, number: int) -> str:
    """Return the text of a prompt: that of the run, or of its newest sample, or its number."""
    prompts = run.facts.get("prompts", [])
    if number < len(prompts):
        return prompts[number]["text"]
    for files in reversed(run.samples.values()):
        path = files.get(number)
        text = None if path is None else prompt_of_file(path)
        if text is not None:
            return text
    return f"prompt {number + 1}"


def sampled_prompt(
    run: RunFiles,
    number: int,
    paths: Sequence[Path | None],
    cache: PictureCache,
    folder: Path,
) -> SampledPrompt:
    """Return a prompt with its pictures. `paths`: of its samples; None: a step has none.

    A resumed run may have other prompts. Samples of the earlier ones are left out."""
    text = prompt_text(run, number)
    details = ""
    prompts = run.facts.get("prompts", [])
    if number < len(prompts):
        details = prompt_details(prompts[number])
    pictures: list[str | None] = []
    links = []
    for path in paths:
        picture: str | None = None
        target = ""
        if path is not None and is_of_prompt(path, text):
            picture = cache.picture(path)
            target = link(path, folder)
        pictures.append(picture)
        links.append(target)
    original = picture_of_caption(run.facts.get("pictures", []), text)
    return SampledPrompt(text, details, original, pictures, links)


def shown_steps(steps: list[int], num_prompts: int) -> list[int]:
    """Return the steps whose pictures fit into a report, spread evenly, with the first and the last
    one."""
    if not steps:
        return []
    max_steps = max(2, MAX_PICTURES // num_prompts)
    chosen = spread_evenly(np.array(steps), max_steps)
    return chosen.tolist()


def prompt_details(prompt: dict[str, Any]) -> str:
    """Return the options of a prompt as one line."""
    facts = [
        f"{prompt['width']} x {prompt['height']}",
        f"seed {prompt['seed']}",
        f"{prompt.get('num_inference_steps')} steps",
        f"guidance {prompt['guidance_scale']}",
    ]
    if prompt["strength"] != 1:
        facts.append(f"strength {prompt['strength']}")
    if prompt["negative"]:
        facts.append(f"negative prompt: {prompt['negative']}")
    return ", ".join(facts)


def link(path: Path, folder: Path) -> str:
    """Return the address of a file from a folder; empty if the file is outside of the folder."""
    try:
        relative = path.absolute().relative_to(folder.absolute())
    except ValueError:
        return ""
    return "./" + quote(relative.as_posix())
