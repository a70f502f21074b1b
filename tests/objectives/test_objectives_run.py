"""Objectives in whole runs: refused in time, validated alike, drawn as they were trained."""

import json
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline
from helpers.objective_cases import PROCESSES, QUANTILES, objective_of
from helpers.objective_maths import FakeFamily, batch_of
from helpers.project import BASE, TWEMOJI

from objectives.config import ObjectiveConfig
from objectives.schedulers import override_scheduler
from training.loss import LossFunction


def validation_of(run_here: Any, arguments: list[str], folder: Any) -> list[dict[str, float]]:
    held_out = f"--data.validation_path={TWEMOJI / 'validation'}"
    assert (
        run_here([*arguments, held_out, f"--output_dir={folder}", "--steps=1", "--overwrite"]) == 0
    )
    return json.loads((folder / "loss.json").read_text())["validation"]


def test_validation_before_the_first_step_is_one_number_for_all_objectives(
    options, run_here, tmp_path
):
    plain = validation_of(run_here, options, tmp_path / "plain")
    others = [
        ["--loss_function=Huber", "--objective.huber_delta=0.1", "--objective.huber_schedule=snr"],
        ["--objective.loss_space=x0", "--objective.continuous_timesteps",
         "--objective.timestep_sampling=cosmap", "--objective.stratified_timesteps"],
        ["--objective.loss_weighting=p2", "--objective.timestep_range", "0.5", "0.9", "--objective.noise_offset=0.2",
         "--objective.multires_noise_iterations=2", "--objective.input_perturbation=0.1"],
    ]  # fmt: skip
    for number, more in enumerate(others):
        found = validation_of(run_here, [*options, *more], tmp_path / str(number))
        assert found[0] == plain[0]
        assert found[1] != plain[1], "which was trained otherwise"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--objective.shift=3", "--objective.edm_std=1"],
            ["DDPM", "--objective.shift 3.0: ", "--objective.edm_std 1.0: "],
        ),
        (
            ["--objective.zero_terminal_snr"],
            ["--objective.zero_terminal_snr", "zero terminal SNR", "v_prediction"],
        ),
        (
            ["--objective.p2_k=2", "--objective.timestep_range", "0.5", "0.1"],
            ["--objective.p2_k 2.0: ", "--objective.timestep_range 0.5 0.1: "],
        ),
    ],
)
def test_an_objective_that_does_not_fit_the_model_is_an_error_before_anything_is_encoded(
    options, run_here, capsys, arguments, words
):
    assert run_here([*options, *arguments]) == 2
    out, error = capsys.readouterr()
    assert all(word in error for word in words)
    assert "encoding" not in out + error


@pytest.mark.parametrize("own", [DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_previews_are_sampled_as_the_base_was_said_to_be(own):
    pipeline = StableDiffusionPipeline.from_pretrained(BASE)
    pipeline.scheduler = own.from_config(pipeline.scheduler.config)
    before = pipeline.scheduler
    assert override_scheduler(pipeline, ObjectiveConfig(loss_space="x0")).scheduler is before
    asked = ObjectiveConfig(prediction_type="v_prediction", zero_terminal_snr=True)
    scheduler = override_scheduler(pipeline, asked).scheduler
    assert isinstance(scheduler, DDIMScheduler if own is PNDMScheduler else own)
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.alphas_cumprod[-1] < 1e-7
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999


@pytest.mark.parametrize("name", PROCESSES)
def test_videos_are_noised_like_images(name):
    frames = torch.randn(len(QUANTILES), 4, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    noise, prediction = frames.roll(1, 0), frames.roll(2, 0)
    flat = [tensor.flatten(2, 3) for tensor in (frames, noise, prediction)]
    losses = [
        LossFunction(
            FakeFamily(answer), objective_of(name, loss_weighting="min-snr"), "MSE", torch.float32
        )(torch.nn.Identity(), batch_of(latents, mixed))
        for latents, mixed, answer in ((frames, noise, prediction), flat)
    ]
    torch.testing.assert_close(*losses)
