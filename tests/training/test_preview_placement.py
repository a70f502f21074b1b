"""Prompts are encoded before training, wherever the text encoders are: the images are those of a whole pipeline."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.family_cases import (
    SIDE,
    Case,
    cases,
    control_contents,
    family_of,
    mask,
    picture,
    to_pil,
)
from helpers.project import BASE
from PIL import Image

from common.hashing import sha256_of_file
from data.precompute.controls import control_pictures
from models.config import ModelConfig
from models.encoder_placement import text_encoders_of
from training.output_config import SampleConfig
from training.sampling import prepare
from training.sampling.draw import draw_sample, pipeline_options
from training.sampling.encoded_prompts import encode_prompts, replayed
from training.sampling.masked_images import MaskedImage
from training.sampling.prompts import SamplePrompt

DRAWN = ["--preview", "--sample.num_inference_steps=2", "--sample.prompts", "a cat"]
CPU = torch.device("cpu")


def preview_hash(run_here, options: list[str], folder: Path, placement: str) -> str:
    more = [f"--output_dir={folder / placement}", f"--model.text_encoder_placement={placement}"]
    assert run_here([*options, *DRAWN, "--steps=1", *more]) == 0
    return sha256_of_file(folder / placement / "preview.png")


def test_text_encoders_that_stay_on_the_cpu_draw_the_same(options, run_here, tmp_path, monkeypatch):
    options = [*options, f"--model.path={BASE}"]
    monkeypatch.setattr(prepare, "read_prompt", lambda path: None)  # encode each time
    expected = preview_hash(run_here, options, tmp_path, "device")
    assert preview_hash(run_here, options, tmp_path, "layers") == expected
    assert preview_hash(run_here, options, tmp_path, "cpu") == expected


@pytest.mark.parametrize("guidance_scale", [pytest.param(1.0, marks=pytest.mark.long), 4.0])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_family_draws_what_its_whole_pipeline_draws(case: Case, guidance_scale):
    family = family_of(case)
    config = SampleConfig(num_inference_steps=2, guidance_scale=guidance_scale)
    prompts = [
        SamplePrompt("a red fox in the snow", negative="blurry").completed(0, SIDE, config),
        SamplePrompt("owl").completed(1, SIDE, config),
    ]
    controls = control_pictures(control_contents(case.controls), "white")
    encoded = encode_prompts(family, ModelConfig(), prompts, CPU, [controls, controls])
    denoiser = family.load_denoiser(torch.float32)
    whole = family.pipeline(denoiser)
    family.trim_text_encoders(whole)
    pipeline = family.pipeline(denoiser, with_text_encoders=False)
    assert not text_encoders_of(pipeline)
    for prompt, results in zip(prompts, encoded, strict=True):
        options = pipeline_options(family, whole, prompt, controls)
        family.set_guidance(pipeline, guidance_scale)
        if family.paints_masks:
            options |= MaskedImage(picture(SIDE, SIDE), to_pil(mask(SIDE, SIDE))).options()
        if family.has_image_input:
            options |= {"image": Image.new("RGB", (SIDE, SIDE), "green"), "num_frames": 5}
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            expected = draw_sample(whole, prompt, options)
            with replayed(pipeline, results, CPU):
                drawn = draw_sample(pipeline, prompt, options)
        assert np.array_equal(drawn, expected)
