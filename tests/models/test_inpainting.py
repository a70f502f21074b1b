"""Models that paint masks: the mask's channels, where masks come from, files, and samples."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.families import flux1, flux1_fill, sd15_inpaint, sdxl, sdxl_inpaint
from helpers.family_cases import (
    Case,
    family_of,
    folder_of,
    mask,
    native_tensors,
    picture,
    pixels_of,
)
from PIL import Image
from safetensors.torch import save_file

from data.media import images
from data.media.buckets import Crop
from models.config import ModelConfig
from models.detect import get_family
from models.families.inpainting import INPAINT_MASK, MASKED_IMAGE

CASES = [sd15_inpaint.CASE, sdxl_inpaint.CASE, flux1_fill.CASE]
SIDE = 64


@pytest.fixture
def masked(tmp_path) -> Path:
    """Two equal images whose left halves are to be painted."""
    folder = tmp_path / "masked"
    folder.mkdir()
    for name in ("one", "two"):
        picture(SIDE, SIDE).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("an owl")
        pixels = np.zeros((SIDE, SIDE), np.uint8)
        pixels[:, : SIDE // 2] = 255
        Image.fromarray(pixels).save(folder / f"{name}_mask.png")
    return folder


def options_for(case: Case, options: list[str], folder: Path) -> list[str]:
    kept = [option for option in options if not option.startswith(("--model.path", "--data.path"))]
    return [*kept, f"--model.path={folder_of(case)}", f"--data.path={folder}", "--data.masks=files"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_channels_of_a_mask_are_its_pixels(case):
    """FLUX.1 Fill gets each pixel, the UNets one of each latent."""
    family = family_of(case)
    pixels = mask(32, 64)[None, None]
    channels = family.mask_channels(pixels)
    back = family.mask_pixels(channels)
    assert back.shape == pixels.shape
    assert channels.shape[-2:] == (32 // family.latent_step, 64 // family.latent_step)
    if case is flux1_fill.CASE:
        assert back.equal(pixels)
    assert family.mask_channels(back).equal(channels)


def test_the_part_to_be_painted_is_hidden_from_the_model():
    family = family_of(sdxl_inpaint.CASE)
    encoders = family.load_encoders("media")
    first = pixels_of(picture(SIDE, SIDE))[None]
    hidden = mask(SIDE, SIDE)[None]
    other = torch.where(hidden[:, None] > 0, -first, first)
    one, two = (family.encode_sample_conditioning(encoders, p, hidden) for p in (first, other))
    assert one.keys() == {MASKED_IMAGE, INPAINT_MASK}
    assert one[MASKED_IMAGE].equal(two[MASKED_IMAGE])
    whole = family.encode_sample_conditioning(encoders, first, torch.zeros_like(hidden))
    assert not whole[MASKED_IMAGE].equal(one[MASKED_IMAGE])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plan_knows_what_is_stored(case):
    family = family_of(case)
    pixels = pixels_of(picture(32, 64))[None]
    encoders = family.load_encoders("media")
    tensors = family.encode_sample_conditioning(encoders, pixels, mask(32, 64)[None])
    latents, _ = family.encode_media(encoders, pixels)
    layout = family.sample_layout(tuple(latents.shape[1:]))
    assert {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()} == {
        name: spec.shape for name, spec in layout.items()
    }


def test_a_model_without_masks_is_an_error(options, run_here, capsys):
    mine = [option for option in options if not option.startswith("--model.path")]
    assert run_here([*mine, f"--model.path={folder_of(sd15_inpaint.CASE)}"]) == 2
    assert "--data.masks none: sd15_inpaint paints" in capsys.readouterr().err


def test_another_mask_is_encoded_again_and_changes_the_loss(
    options, run_here, masked, tmp_path, capsys
):
    mine = [
        *options_for(sd15_inpaint.CASE, options, masked),
        "--data.mask_min_value=1",
        "--steps=2",
    ]
    losses = []
    for name in ("half", "top"):
        folder = tmp_path / name
        assert run_here([*mine, f"--output_dir={folder}"]) == 0
        assert "encoded now: 1 images" in capsys.readouterr().out
        losses.append(json.loads((folder / "loss.json").read_text())["loss_per_step"])
        for file in masked.glob("*_mask.png"):
            Image.open(file).rotate(90).save(file)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("case", [sd15_inpaint.CASE, flux1_fill.CASE], ids=str)
def test_samples_paint_the_masks_of_the_data(case, options, run_here, masked, tmp_path):
    """In the sheet, the first row shows the masked images. Another number of a caption is another image."""
    mine = options_for(case, options, masked)
    more = ["--steps=1", "--preview", "--sample.num_inference_steps=1", "--sample.guidance_scale=1"]
    kept = [option for option in mine if option != "--no_preview"]
    assert run_here([*kept, *more]) == 0
    sheet = np.asarray(Image.open(tmp_path / "out" / "preview.png").convert("RGB"), int)
    gray = (np.abs(sheet - 128).max(-1) <= 3).sum()
    assert gray >= 2 * SIDE * SIDE // 2


NATIVE = {
    "flux1_fill": (flux1_fill.CASE, flux1.DEV),
    "sdxl_inpaint": (sdxl_inpaint.CASE, sdxl.CASE),
}


@pytest.mark.parametrize("name", NATIVE)
def test_a_single_file_tells_what_it_paints(name, tmp_path):
    """By the channels of its first layer."""
    for case in NATIVE[name]:
        path = tmp_path / f"{case}.safetensors"
        save_file(native_tensors(case, "model.diffusion_model."), path)
        family = get_family(ModelConfig(path=str(path), config=str(folder_of(case))))
        assert family.name == case.family
        if case.family == "flux1_fill":
            denoiser = family.load_denoiser(torch.float32)
            expected = family_of(case).load_denoiser(torch.float32).state_dict()
            assert all(tensor.equal(expected[key]) for key, tensor in denoiser.state_dict().items())


def test_a_folder_of_the_other_kind_names_the_family_to_use(tmp_path):
    from common.errors import ModelError

    folder = tmp_path / "model"
    shutil.copytree(folder_of(sd15_inpaint.CASE), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"--model\.family sd15_inpaint"):
        get_family(ModelConfig(path=str(folder)))


def test_all_masks_without_anything_to_paint_are_named(options, run_here, masked, capsys):
    for name, level in (("one", 0), ("two", 100)):
        Image.new("L", (SIDE, SIDE), level).save(masked / f"{name}_mask.png")
    assert run_here(options_for(sd15_inpaint.CASE, options, masked)) == 2
    error = capsys.readouterr().err
    for name in ("one.png", "two.png"):
        assert f"{name}: its mask is black everywhere" in error


def test_the_colors_under_transparent_parts_surround_what_is_painted(masked):
    path = masked / "one.png"
    image = Image.open(path).convert("RGB")
    alpha = Image.new("L", image.size, 0)
    alpha.paste(255, (0, 0, SIDE, SIDE // 2))
    transparent = image.copy()
    transparent.putalpha(alpha)
    transparent.save(path)
    crop = Crop(SIDE, SIDE, SIDE, SIDE, 0, 0, SIDE, SIDE)
    stored = images.pixels(path.read_bytes(), crop, None)
    assert stored.equal(pixels_of(image))
    assert not images.pixels(path.read_bytes(), crop, "white").equal(stored)
