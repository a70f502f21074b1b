"""The embedded demos: they learn, visibly and measurably, and their models are what they say they are."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from helpers.project import BASE, FLOW_BASE, PROJECT, TWEMOJI, accelerate_launch, script
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer, Qwen2Tokenizer, Qwen3Model


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param([], marks=pytest.mark.long, id="demo"),  # what runs without a recipe
        pytest.param(["recipes/demo_flow.yaml"], marks=pytest.mark.long, id="demo_flow"),
    ],
)
def test_a_demo_learns(recipe, tmp_path):
    options = [f"--output_dir={tmp_path}", f"--data.cache_dir={tmp_path / 'cache'}"]
    result = script([*recipe, *options], accelerate_launch())
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


BASES = {
    BASE: {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
        "scheduler": DDIMScheduler,
    },
    FLOW_BASE: {
        "transformer": ZImageTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": Qwen3Model,
        "tokenizer": Qwen2Tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    },
}


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_a_base_is_a_real_pipeline(base):
    pipeline = DiffusionPipeline.from_pretrained(base)
    for name, kind in BASES[base].items():
        assert isinstance(getattr(pipeline, name), kind)


def test_both_bases_are_small():
    sizes = []
    for base in (BASE, FLOW_BASE):
        sizes.append(sum(path.stat().st_size for path in base.rglob("*") if path.is_file()))
    assert sum(sizes) <= 28_000_000
    assert sizes[1] <= 14_000_000


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_latents_are_normalized_by_scale_and_shift_alone(base):
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae", dtype=torch.float32)
    shift = vae.config.shift_factor or 0.0
    pixels = torch.stack([
        torch.from_numpy(np.asarray(Image.open(f).convert("RGB")).copy()).permute(2, 0, 1) / 127.5 - 1
        for f in sorted((TWEMOJI / "train").glob("*.png"))
    ])  # fmt: skip
    with torch.no_grad():
        latents = (vae.encode(pixels).latent_dist.mode() - shift) * vae.config.scaling_factor
        decoded = vae.decode(latents / vae.config.scaling_factor + shift).sample
        error = (decoded - pixels).abs().mean()
    assert 0.7 < latents.std() < 1.4
    assert latents.mean((0, 2, 3)).abs().max() < 1.0
    assert error < 0.06, "the autoencoder shows what it is given"


@pytest.mark.parametrize("style", ["screen_print", "blue_tile"])
def test_a_style_trains_and_validates_on_different_captions(style):
    folder = PROJECT / "examples" / "emoji" / style
    captions = {}
    for part, count in (("train", 160), ("validation", 12)):
        names = {path.stem for path in (folder / part).glob("*.png")}
        assert len(names) == count
        captions[part] = {(folder / part / f"{name}.txt").read_text() for name in names}
    assert not captions["train"] & captions["validation"]
