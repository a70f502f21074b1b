"""Every family's recipe runs as it is, in bf16, with a tiny model of the family in place of the real one."""

import json
import shutil

import pytest
import torch
import yaml
from helpers.family_cases import SIDE, Case, cases, folder_of
from helpers.project import PROJECT

from data.media.buckets import Buckets
from models import FAMILIES, family_classes
from models.config import ModelConfig
from models.detect import get_family
from models.families.unet_family import UNetFamily
from training.cli import validate_options
from training.config import TrainConfig

RECIPES = {path.stem: path for path in sorted((PROJECT / "recipes").glob("*.yaml"))}


def config_of(family: str) -> TrainConfig:
    return validate_options(
        yaml.safe_load(RECIPES[family].read_text(encoding="utf-8")), RECIPES[family].name, ""
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_validates_on_a_share_of_the_images(family):
    config = config_of(family)
    assert 0 < config.validation.every < config.steps
    assert config.data.validation_fraction or config.data.validation_path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_recomputes_the_blocks_that_need_the_least_memory(family):
    """With fake CUDA tensors FLUX.2 takes 11 GB more at depth 2: norms are kept, and in fp32."""
    is_unet = issubclass(family_classes()[family], UNetFamily)
    assert config_of(family).checkpoint_depth == (2 if is_unet else 1)


@pytest.mark.parametrize("step", [16, 32])
@pytest.mark.parametrize("family", ["wan", "wan_i2v"])
def test_videos_of_480p_keep_their_size(family, step):
    crop = Buckets.of(config_of(family).data, step, only_square=False).crop(832, 480)
    assert (crop.crop_width, crop.crop_height) == (832, 480)


def test_z_image_is_trained_alike_whatever_its_scheduler_says(tmp_path):
    case = next(case for case in cases() if case.family == "z_image")
    levels = []
    for shift in (3.0, 6.0):
        folder = tmp_path / str(shift)
        shutil.copytree(folder_of(case), folder)
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(
            json.dumps(
                {**json.loads(path.read_text()), "shift": shift, "use_dynamic_shifting": False}
            )
        )
        process = get_family(ModelConfig(path=str(folder))).process(config_of("z_image").objective)
        levels.append(process.levels(torch.linspace(0.1, 0.9, 5), tokens=4096).sigma)
    assert levels[0].equal(levels[1])


@pytest.fixture
def data_options(videos, controls):
    """Case -> options of its data, if images with captions are not enough."""

    def of_case(case: Case) -> list[str]:
        if case.first_frame:
            return [f"--data.path={videos}", "--data.frames=9"]
        if case.controls:
            return ["--data.control_paths", *map(str, controls[: case.controls])]
        return []

    return of_case


VARIANTS = (
    "sd15_inpaint", "sdxl_inpaint", "flux1_fill", "flux1_kontext", "qwen_image_edit", "qwen_image_edit_plus",
    "z_image_omni", "flux2", "wan_i2v",
)  # fmt: skip
"""Families whose recipes differ little from another one; make test-long runs them."""


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.long if name in VARIANTS else ())
        for name in FAMILIES
        if name != "sd15"
    ],
)
def test_a_recipe_runs_on_a_tiny_model(family, options, data_options, run_here, tmp_path, capsys):
    recipe = yaml.safe_load(RECIPES[family].read_text(encoding="utf-8"))
    assert recipe["model"]["family"] == family
    case = next(case for case in cases() if case.family == family)
    kept = ("--data.path", "--data.cache_dir", "--output_dir")
    small = [
        *(option for option in options if option.startswith(kept)), *case.options,
        f"--model.path={folder_of(case)}", f"--data.resolution={SIDE}", "--steps=2", "--data.num_workers=0",
        "--sample.num_inference_steps=2", "--validation.every=0",
        *data_options(case),
    ]  # fmt: skip
    assert run_here([str(RECIPES[family]), *small]) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "lora.safetensors").is_file()
    out = capsys.readouterr().out
    assert "base weights bfloat16" in out
    assert "could not be drawn" not in out
