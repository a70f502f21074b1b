"""The embedded demo as `make demo` runs it: it learns, visibly and measurably, and its model is what it says it is."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from helpers.project import BASE, PROJECT, TWEMOJI, accelerate_launch, script
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer


@pytest.mark.slow
def test_the_demo_learns(tmp_path):
    result = script(
        [f"--output_dir={tmp_path}", f"--data.cache_dir={tmp_path / 'cache'}"], accelerate_launch()
    )
    assert result.returncode == 0, result.stderr
    validation = json.loads((tmp_path / "loss.json").read_text())["validation"]
    fall = 1 - validation[-1]["loss"] / validation[0]["loss"]
    print(
        f"validation loss {validation[0]['loss']:.4f} -> {validation[-1]['loss']:.4f}: {100 * fall:.1f} % lower"
    )
    assert fall >= 0.6
    assert f"({-100 * fall:+.1f} %)" in result.stdout, "the number is printed"
    grid = np.asarray(Image.open(tmp_path / "preview.png"), dtype=float)
    assert np.abs(grid[8:136, 72:200] - grid[144:272, 72:200]).mean() > 5, "before and after differ"


def test_the_base_is_a_real_and_small_pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(BASE)
    kinds = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, DDIMScheduler)
    assert all(isinstance(getattr(pipeline, name), kind)
               for name, kind in zip(("unet", "vae", "text_encoder", "scheduler"), kinds, strict=True))  # fmt: skip
    assert isinstance(pipeline.tokenizer, CLIPTokenizer)
    files = [
        f
        for f in (PROJECT / "examples" / "emoji").rglob("*")
        if f.is_file() and "__pycache__" not in f.parts
    ]
    assert sum(f.stat().st_size for f in files) <= 28_000_000


def test_latents_are_normalized_by_the_scaling_factor_alone():
    vae = AutoencoderKL.from_pretrained(BASE, subfolder="vae", dtype=torch.float32)
    pixels = torch.stack([
        torch.from_numpy(np.asarray(Image.open(f).convert("RGB")).copy()).permute(2, 0, 1) / 127.5 - 1
        for f in sorted((TWEMOJI / "train").glob("*.png"))
    ])  # fmt: skip
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        error = (vae.decode(latents / vae.config.scaling_factor).sample - pixels).abs().mean()
    assert 0.7 < latents.std() < 1.4
    assert latents.mean((0, 2, 3)).abs().max() < 1.0
    assert error < 0.06, "the autoencoder shows what it is given"


@pytest.mark.parametrize("style", ["screen_print", "night_print"])
def test_a_style_trains_and_validates_on_different_captions(style):
    folder = PROJECT / "examples" / "emoji" / style
    captions = {}
    for part, count in (("train", 160), ("validation", 12)):
        names = {path.stem for path in (folder / part).glob("*.png")}
        assert len(names) == count
        captions[part] = {(folder / part / f"{name}.txt").read_text() for name in names}
    assert not captions["train"] & captions["validation"]
