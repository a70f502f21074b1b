"""Models that edit: the sizes of control images, files that several families share, and variants."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import small_controls
from helpers.families import (
    flux1_kontext,
    flux2,
    flux2_klein,
    qwen_image_edit,
    qwen_image_edit_plus,
)
from helpers.family_cases import (
    PROMPTS,
    Case,
    call_options,
    collate,
    control_contents,
    family_of,
    folder_of,
    native_tensors,
    rows_with_controls,
    run_pipeline,
)
from PIL import Image
from safetensors.torch import save_file

from common.errors import ConfigError, ModelError
from data.config import DataConfig
from models.config import ModelConfig
from models.controls import control_latents, limited_area, rounded_down, without_controls
from models.detect import get_family
from training.output_config import SampleConfig
from training.sampling.control_images import (
    check_controls,
    images_of_prompts,
    with_control_row,
)
from training.sampling.prompts import parse_prompt

KONTEXT, PLUS = flux1_kontext.CASE, qwen_image_edit_plus.CASE
SIZES = [(512, 512), (1600, 900), (640, 1536), (333, 777), (4000, 500), (65, 70)]

QWEN_SIZES = {
    (512, 512): (1024, 1024), (1600, 900): (1376, 768), (640, 1536): (672, 1600), (333, 777): (672, 1568),
    (4000, 500): (2912, 352), (65, 70): (992, 1056),
}  # fmt: skip
"""Worked out by hand: the sides of a million pixels, rounded to multiples of 32."""


@pytest.fixture
def true_sizes(monkeypatch):
    """The real sizes of control images, which the other tests make smaller."""
    kontext = small_controls.pipeline_flux_kontext
    plus = small_controls.pipeline_qwenimage_edit_plus
    monkeypatch.setattr(kontext, "PREFERRED_KONTEXT_RESOLUTIONS", small_controls.TRUE_SIZES)
    monkeypatch.setattr(plus, "calculate_dimensions", small_controls.true_dimensions)


@pytest.mark.parametrize("size", SIZES)
def test_qwen_scales_as_its_pipeline(true_sizes, size):
    width, height = size
    for case in (qwen_image_edit.CASE, PLUS):
        found = family_of(case).control_size(width, height, None)
        expected = small_controls.true_dimensions(1024 * 1024, width / height)
        assert (found.width, found.height) == expected == QWEN_SIZES[size]
        assert (found.scaled_width, found.scaled_height) == expected
    small = family_of(PLUS).control_size(width, height, 256 * 256)
    assert 32 * 32 <= small.width * small.height <= 256 * 256
    tiny = family_of(PLUS).control_size(width, height, 256)
    assert (tiny.width, tiny.height) == (32, 32)


@pytest.mark.parametrize("size", SIZES)
def test_kontext_scales_as_its_pipeline(true_sizes, size):
    """By the line of FluxKontextPipeline.__call__."""
    width, height = size
    ratio = width / height
    _, expected_width, expected_height = min(
        (abs(ratio - w / h), w, h) for w, h in small_controls.TRUE_SIZES
    )
    found = family_of(KONTEXT).control_size(width, height, None)
    assert (found.width, found.height) == (expected_width, expected_height)
    small = family_of(KONTEXT).control_size(width, height, 512 * 512)
    assert small.width * small.height <= 512 * 512
    assert small.width / small.height == pytest.approx(expected_width / expected_height, rel=0.1)


@pytest.mark.parametrize("size", SIZES)
def test_flux2_scales_and_crops_as_its_pipeline(size):
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    family = family_of(flux2.PLAIN)
    image = Image.new("RGB", size)
    if image.width * image.height > 1024 * 1024:
        image = Flux2ImageProcessor._resize_to_target_area(image, 1024 * 1024)
    step = family.pixel_step
    found = family.control_size(*size, None)
    assert (found.scaled_width, found.scaled_height) == image.size
    assert (found.width, found.height) == (image.width // step * step, image.height // step * step)


def test_sizes_have_at_least_one_step():
    assert rounded_down(3, 16) == 16
    assert limited_area(10, 10, None) == (10, 10)
    assert limited_area(20, 10, 50) == (10, 5)


def test_qwen_2511_gives_control_images_no_noise():
    """Its transformer has two timesteps, by the shapes of the images."""
    case = replace(PLUS, make=partial(PLUS.make, zero_cond_t=True), name="qwen-2511")
    call, family = run_pipeline(case), family_of(case)
    assert family.comfy_nodes.reference_method == "index_timestep_zero"
    assert family_of(PLUS).comfy_nodes.reference_method == ""
    denoiser = family.load_denoiser(torch.float32).eval()
    assert denoiser.config.zero_cond_t
    with torch.no_grad():
        rows = rows_with_controls(family, ["a photo of a smiling red cat", "owl"], case.controls)
        timestep = call.timestep.expand(2).float()
        found = family.predict(denoiser, call.noisy, timestep, collate(family, rows))
    scale = float(call.prediction.abs().max())
    torch.testing.assert_close(found, call.prediction, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("case", [flux2.EDIT, flux2_klein.EDIT], ids=str)
def test_flux2_predicts_as_its_pipeline_with_control_images(case: Case):
    call, family = run_pipeline(case), family_of(case)
    denoiser = family.load_denoiser(torch.float32).eval()
    with torch.no_grad():
        rows = rows_with_controls(family, PROMPTS, case.controls)
        timestep = call.timestep.expand(2).float()
        found = family.predict(denoiser, call.noisy, timestep, collate(family, rows))
    scale = float(call.prediction.abs().max())
    torch.testing.assert_close(found, call.prediction, rtol=1e-5, atol=1e-5 * scale)


def test_flux2_trains_and_draws_with_control_images(options, controls, run_here, tmp_path):
    folder = folder_of(flux2_klein.EDIT)
    mine = [*options, f"--model.path={folder}", "--data.resolution=32", "--steps=2", "--preview",
            "--sample.num_inference_steps=2", "--data.control_paths", str(controls[0].parent / "large")]  # fmt: skip
    large = controls[0].parent / "large"
    large.mkdir()
    for path in controls[1].iterdir():
        with Image.open(path) as image:
            image.resize((96, 80)).save(large / path.name)
    assert run_here(mine) == 0
    with Image.open(tmp_path / "out" / "preview.png") as preview:
        assert preview.height > 3 * 128, "control images, before and after"


@pytest.mark.parametrize("case", [KONTEXT, PLUS], ids=str)
def test_control_images_change_the_prediction(case: Case):
    family = family_of(case)
    denoiser = family.load_denoiser(torch.float32).eval()
    with torch.no_grad():
        cond = collate(family, rows_with_controls(family, ["owl"], case.controls))
        noisy = torch.randn(1, family.latent_channels, 8, 8)
        predict = family.predict
        found = predict(denoiser, noisy, torch.tensor([500.0]), cond)
        without = predict(denoiser, noisy, torch.tensor([500.0]), without_controls(cond))
    assert len(control_latents(cond)) == case.controls
    assert found.shape == without.shape == noisy.shape
    assert not torch.allclose(found, without, atol=1e-4)


class TestSharedFiles:
    """FLUX.1 and Kontext, and the models of Qwen-Image, have the same tensors in a single file."""

    @pytest.fixture(scope="class")
    def file(self, tmp_path_factory):
        path = tmp_path_factory.mktemp("file") / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in native_tensors(KONTEXT).items()}
        save_file(tensors, path)
        return str(path)

    def test_the_configuration_decides(self, file):
        family = get_family(ModelConfig(path=file, config=str(folder_of(KONTEXT))))
        assert family.name == "flux1_kontext"

    def test_the_option_decides(self, file, tmp_path):
        folder = tmp_path / "configuration"
        shutil.copytree(folder_of(KONTEXT), folder)
        family = get_family(ModelConfig(path=file, family="flux1_kontext", config=str(folder)))
        assert family.name == "flux1_kontext"
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = "FluxPipeline"
        (folder / "model_index.json").write_text(json.dumps(index))
        assert get_family(ModelConfig(path=file, config=str(folder))).name == "flux1"

    def test_a_family_with_other_tensors_is_refused(self, file):
        with pytest.raises(ModelError, match="is flux1, not qwen_image_edit"):
            get_family(ModelConfig(path=file, family="qwen_image_edit"))

    def test_a_folder_says_what_it_is(self):
        with pytest.raises(ModelError, match="is flux1_kontext, not flux1"):
            get_family(ModelConfig(path=str(folder_of(KONTEXT)), family="flux1"))


class TestPrompts:
    def test_control_images_are_repeatable(self):
        prompt = parse_prompt("a cat --ci a.png --w 64 --ci b c.png")
        assert prompt.controls == ("a.png", "b c.png")
        assert prompt.width == 64

    def test_errors_are_named_before_anything_is_encoded(self, tmp_path):
        Image.new("RGB", (64, 64)).save(tmp_path / "fine.png")
        (tmp_path / "bad.png").write_bytes(b"bad")
        prompts = (
            f"one --ci {tmp_path / 'missing.png'}",
            f"two --ci {tmp_path / 'bad.png'} --ci {tmp_path / 'fine.png'}",
        )
        with pytest.raises(ConfigError) as error:
            check_controls(SampleConfig(prompts=prompts), family_of(KONTEXT), "white")
        message = str(error.value)
        assert "missing.png: could not be read" in message
        assert "bad.png: not an image" in message
        assert "--ci: 2 control images; this model takes at most 1" in message

    def test_a_prompt_may_have_none(self):
        prompts = [parse_prompt("a --ci none"), parse_prompt("b")]
        content = control_contents(1)
        images = images_of_prompts(prompts, family_of(KONTEXT), DataConfig(), [content])
        assert [len(pictures) for pictures in images] == [0, 1]
        with pytest.raises(ConfigError, match="no control image, which this model needs"):
            check_controls(SampleConfig(prompts=("a --ci none",)), family_of(PLUS), "white")

    def test_other_models_take_none(self, tmp_path):
        from helpers.families import z_image

        Image.new("RGB", (64, 64)).save(tmp_path / "fine.png")
        config = SampleConfig(prompts=(f"one --ci {tmp_path / 'fine.png'}",))
        with pytest.raises(ConfigError, match="this model takes none"):
            check_controls(config, family_of(z_image.CASE), "white")

    def test_a_sheet_begins_with_the_control_images(self):
        import numpy as np

        red, blue = (Image.new("RGB", (20, 10), color) for color in ("red", "blue"))
        stills = np.zeros((2, 10, 40, 3), np.float32)
        rows = with_control_row({"step 1": stills}, [[red, blue], []])
        assert list(rows) == ["control", "step 1"]
        first, second = rows["control"]
        assert first[5, 5].tolist() == [1, 0, 0]
        assert first[5, 35].tolist() == [0, 0, 1]
        assert (second == 1).all()
        assert with_control_row({"step 1": stills}, [[], []]).keys() == {"step 1"}


def test_options_draw_an_image_of_the_size_of_the_prompt():
    assert call_options(KONTEXT, 48, 32)["max_area"] == 48 * 32
