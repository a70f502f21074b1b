"""The control images of samples, for models that edit.

A prompt names its control images with --ci. A prompt without them takes those of a sample of the data:
the first prompt those of the first sample, and so on.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from common.errors import ConfigError, DataError, error_list
from data.config import DataConfig
from data.media.images import picture
from data.precompute.build import DatasetBuilder, Datasets
from data.precompute.controls import control_pictures
from models.base import ModelFamily
from training.config import TrainConfig
from training.output_config import SampleConfig
from training.sampling.prompts import (
    NUM_DEFAULT_PROMPTS,
    SamplePrompt,
    configured_prompts,
    located_prompts,
)

ControlImages = list[Image.Image]
NO_IMAGE = "none"
"""Value of --ci for a sample without a control image."""


def check_controls(config: SampleConfig, family: ModelFamily, background: str) -> None:
    """Raise ConfigError for control images in prompts that cannot be read or that the model does not
    take."""
    errors = []
    for place, prompt in located_prompts(config):
        for path in named_files(prompt):
            error = image_error(Path(path), family, background)
            if error is not None:
                errors.append(f"{place}: --ci {path}: {error}")
        if prompt.controls:
            count_error = family.controls.count_error(len(named_files(prompt)))
            if count_error is not None:
                errors.append(f"{place}: --ci: {count_error}")
    if errors:
        raise ConfigError(error_list("samples cannot be drawn with these control images", errors))


def named_files(prompt: SamplePrompt) -> tuple[str, ...]:
    """Return the paths of the control images that a prompt names. `--ci none` names none."""
    return () if prompt.controls == (NO_IMAGE,) else prompt.controls


def image_error(path: Path, family: ModelFamily, background: str) -> str | None:
    """Return an error if a control image cannot be read, or has a size that the pipeline refuses."""
    try:
        image = picture(path.read_bytes(), background)
    except OSError as error:
        return f"could not be read: {error.strerror}"
    except DataError as error:
        return str(error)
    return family.control_error(image.width, image.height)


def images_of_prompts(
    prompts: Sequence[SamplePrompt],
    family: ModelFamily,
    data: DataConfig,
    sample_controls: Sequence[Sequence[bytes]],
) -> list[ControlImages]:
    """Return the control images of each prompt.

    `sample_controls`: the files of the control images of the first samples."""
    if not family.controls.max_count:
        return [[] for _ in prompts]
    images = []
    for number, prompt in enumerate(prompts):
        contents: Sequence[bytes] = [Path(path).read_bytes() for path in named_files(prompt)]
        if not prompt.controls and sample_controls:
            contents = sample_controls[number % len(sample_controls)]
        images.append(control_pictures(contents, data.background))
    return images


def first_controls(
    config: TrainConfig, builder: DatasetBuilder, datasets: Datasets
) -> list[tuple[bytes, ...]]:
    """Return the files of the control images of the first samples, which are drawn by default.

    The list is empty if the samples need none, or the data has none."""
    prompts = configured_prompts(config.sample)
    have_images = bool(prompts) and all(prompt.controls for prompt in prompts)
    takes_images = builder.family.controls.max_count > 0
    if not config.draws_samples or not takes_images or have_images:
        return []
    dataset = datasets.validation or datasets.train
    first_rows = range(min(len(dataset), NUM_DEFAULT_PROMPTS))
    if not any(dataset.num_controls(row) for row in first_rows):
        return []
    indices = np.asarray(dataset.samples["listed"][:NUM_DEFAULT_PROMPTS])
    listed = builder.open_listed().rows(np.unique(indices))
    controls = {}
    for file in builder.sources.contents(listed):
        controls[file.listed] = file.controls
    files = []
    for index in indices.tolist():
        files.append(controls.get(index, ()))
    return files if any(files) else []


def missing_images_error(family: ModelFamily, controls: Sequence[ControlImages]) -> str | None:
    """Return an error if prompts have no control image, and the model needs one."""
    if not family.controls.is_required or all(controls):
        return None
    return (
        "this model needs a control image for each prompt, and the data has none that can be read. "
        "Name one in each prompt: --ci FILE"
    )


def with_control_row(
    rows: dict[str, np.ndarray], controls: Sequence[ControlImages]
) -> dict[str, np.ndarray]:
    """Return the rows of a sheet, each (N, H, W, 3) in [0, 1], below a row of the control images.

    Several images of a prompt are side by side. The row is left out if no prompt has any."""
    if not any(controls):
        return rows
    _, height, width, _ = next(iter(rows.values())).shape
    size = (width, height)
    pictures = []
    for images in controls:
        side_by_side = beside_each_other(images, size)
        padded = ImageOps.pad(side_by_side, size, color="white")
        levels = np.asarray(padded, np.float32)
        pictures.append(levels / 255)
    control_row = np.stack(pictures)
    return {"control": control_row, **rows}


def beside_each_other(images: ControlImages, size: tuple[int, int]) -> Image.Image:
    """Return images of one height in a row; without images, a white image of `size`."""
    if not images:
        return Image.new("RGB", size, "white")
    height = size[1]
    scaled = [ImageOps.contain(image, (height * 4, height)) for image in images]
    width = sum(image.width for image in scaled)
    row = Image.new("RGB", (width, height), "white")
    left = 0
    for image in scaled:
        row.paste(image, (left, (height - image.height) // 2))
        left += image.width
    return row
