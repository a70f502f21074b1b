"""What several tests share: the embedded model and images, and ways to run the script."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from helpers.project import BASE, TWEMOJI, reset_accelerate, write_animations
from PIL import Image, ImageOps


@pytest.fixture(autouse=True)
def restored_environment() -> Iterator[None]:
    """Restores the environment's variables, which Accelerate and DeepSpeed set, after each test."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store of encoded images for all tests of a worker: each image is encoded once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of four training images with captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, emoji in (("cat", "grinning"), ("dog", "joy"), ("owl", "wink"), ("tiger", "cry")):
        for suffix in (".png", ".txt"):
            shutil.copy(TWEMOJI / "train" / f"{emoji}{suffix}", folder / f"{name}{suffix}")
    return folder


@pytest.fixture
def controls(tmp_path: Path, images: Path) -> list[Path]:
    """Two folders of control images: the training images in gray, and larger ones, turned upside down."""
    gray, turned = tmp_path / "gray", tmp_path / "turned"
    for folder in (gray, turned):
        folder.mkdir()
    for path in images.glob("*.png"):
        with Image.open(path) as image:
            opened = image.convert("RGB")
        ImageOps.grayscale(opened).save(gray / path.name)
        opened.rotate(180).resize((96, 80)).save(turned / path.name)
    return [gray, turned]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A folder of two animations of 9 frames with captions."""
    return write_animations(tmp_path / "videos")


@pytest.fixture(scope="session")
def fp32_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with weights in fp32, to be read only."""
    from helpers.tool_cases import base_folder  # what loads torch is not for all tests

    return base_folder(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def lora_file(tmp_path: Path) -> Path:
    """A LoRA on some layers of the embedded model, in a file of kohya's."""
    from helpers.tool_cases import of_case

    return of_case(tmp_path, "LoRA")[0]


@pytest.fixture
def options(tmp_path: Path, images: Path, cache_dir: Path) -> list[str]:
    """Options of a run that takes about a second: six fp32 steps of batch 2 on four images, no previews."""
    return [
        f"--model.path={BASE}", f"--data.path={images}", f"--data.cache_dir={cache_dir}", "--data.resolution=64",
        f"--output_dir={tmp_path / 'out'}", "--steps=6", "--batch_size=2", "--rank=4", "--training_dtype=fp32",
        "--lora_dtype=fp32", "--no_gradient_checkpointing", "--no_preview",
        "--adapter.targets=attention", "--tracking.log_every=3",
    ]  # fmt: skip


@pytest.fixture
def run_here() -> Iterator[Callable[[list[str]], int]]:
    """Runs the script's main() in this process, with Accelerate's global state fresh; returns the exit code."""
    import train_lora

    def run(argv: list[str]) -> int:
        reset_accelerate()
        return train_lora.main(argv)

    yield run
    reset_accelerate()


@pytest.fixture
def run_into(
    options: list[str], run_here: Callable[[list[str]], int], tmp_path: Path
) -> Callable[..., Path]:
    """Runs with options into a folder of tmp_path; returns the folder."""

    def run_with(name: str, *more: str) -> Path:
        folder = tmp_path / name
        assert run_here([*options, *more, f"--output_dir={folder}"]) == 0
        return folder

    return run_with
