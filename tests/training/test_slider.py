"""Sliders: adapters that are trained from pairs of prompts, with or without images."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers.families import flux1_fill, wan
from helpers.family_cases import collate, family_of
from helpers.project import BASE, FLOW_BASE
from helpers.runs import assert_same_result
from safetensors import safe_open
from torch import nn

from adapter_files.spellings import layer_spellings
from common.errors import ConfigError
from data.batches import Batch
from data.config import DataConfig
from data.prompts import EMPTY, NEGATIVE, POSITIVE, TARGET, slider_direction, slider_prompts
from models.config import ModelConfig
from models.detect import get_family
from objectives.config import ObjectiveConfig, SliderConfig
from objectives.objective import NoisedBatch, mix
from objectives.processes import DDPM, EDM, Flow
from training.build import attach_adapters, extra_prompts
from training.cli import load_config
from training.loss import LossFunction, build_loss
from training.report.hub_folder import Publication, model_card
from training.report.run_files import read_run
from training.slider_loss import SliderLoss, split_noisy

PROMPTS = [
    "--objective.slider.targets", "a heart", "a face",
    "--objective.slider.positives", "a red heart", "a happy face",
    "--objective.slider.negatives", "a blue heart", "a sad face",
]  # fmt: skip


FROM_NOISE = SliderConfig(
    ("a heart", "a face"), ("a red heart", "a happy face"), ("a blue heart", "a sad face")
)
FROM_IMAGES = replace(FROM_NOISE, start_from="images")


def without_data(options: list[str]) -> list[str]:
    return [option for option in options if not option.startswith("--data.path")]


@pytest.fixture
def slider_options(options) -> list[str]:
    """Options of a run without images."""
    steps = "--objective.slider.denoising_steps=2"
    return [*without_data(options), *PROMPTS, steps]


def test_a_run_needs_no_images(slider_options, run_here, tmp_path, capsys):
    assert run_here(slider_options) == 0
    output = capsys.readouterr().out
    assert "images      none are needed; encoded now: " in output
    assert "7 forward passes more than usual" in output
    assert "epochs" not in output
    losses = json.loads((tmp_path / "out" / "loss.json").read_text())["loss_per_step"]
    assert len(losses) == 6
    assert min(losses) > 0


def test_a_killed_run_goes_on_bit_for_bit(slider_options, run_here, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert run_here([*slider_options, f"--output_dir={whole}"]) == 0
    assert run_here([*slider_options, f"--output_dir={half}", "--steps=3"]) == 0
    assert run_here([*slider_options, f"--output_dir={half}"]) == 0
    assert_same_result(whole, half)


@pytest.mark.parametrize("algorithm", ["LoRA", pytest.param("OFT", marks=pytest.mark.long)])
def test_recomputed_blocks_have_the_strength_of_the_batch(
    slider_options, run_here, tmp_path, algorithm
):
    plain, small = tmp_path / "plain", tmp_path / "small"
    options = [*slider_options, f"--algorithm={algorithm}", "--learning_rate=1e-2"]
    assert run_here([*options, f"--output_dir={plain}"]) == 0
    memory = ["--gradient_checkpointing", "--memory.offload_blocks=all"]
    assert run_here([*options, *memory, f"--output_dir={small}"]) == 0
    assert_same_result(plain, small)


class Setup:
    """A denoiser with changed adapters, the same one without, and a batch of a slider."""

    def __init__(self, base: Path, slider: SliderConfig, strength: float = 1.0):
        config = load_config([f"--model.path={base}", *PROMPTS, "--adapter.targets=all"])
        self.family = get_family(ModelConfig(path=str(base)))
        self.denoiser = self.family.load_denoiser(torch.float32)
        self.plain = self.family.load_denoiser(torch.float32)
        names = layer_spellings(self.family, self.denoiser)
        self.adapted, _ = attach_adapters(config, self.family, self.denoiser, names)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.adapted.named_parameters().values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        self.loss: LossFunction = build_loss(
            self.family, ObjectiveConfig(slider=slider), "MSE", torch.float32
        )
        self.slider_loss = SliderLoss(self.loss, slider)
        texts = {TARGET: "a heart", POSITIVE: "a red heart", NEGATIVE: "a tiger", EMPTY: ""}
        encoders = self.family.load_encoders("text")
        prompts = {}
        for role, text in texts.items():
            rows = self.family.encode_prompt(encoders, [text] * 2)
            prompts[role] = collate(self.family, rows)
        shape = (2, 4, 8, 8)
        self.batch = Batch(
            latents=torch.randn(shape, generator=generator),
            noise=torch.randn(shape, generator=generator),
            quantile=torch.tensor([0.3, 0.8]),
            cond={},
            weight=torch.ones(2),
            crop=torch.zeros(2, 8, dtype=torch.int32),
            visits=range(2),
            prompts=prompts,
            strength=strength,
        )

    def predictions(self, noised: NoisedBatch, denoiser: nn.Module) -> dict[str, torch.Tensor]:
        """The predictions of a denoiser for each prompt."""
        return {
            role: self.loss.predict(denoiser, noised, self.batch, cond)
            for role, cond in self.batch.prompts.items()
        }

    def losses(self) -> torch.Tensor:
        with self.adapted.at_strength(self.batch.strength):
            losses = self.slider_loss(self.denoiser, self.adapted, self.batch)
            losses.mean().backward()
        return losses.detach()


@pytest.mark.parametrize("strength", [1.0, -1.0])
def test_the_goal_is_the_difference_of_the_base(strength):
    setup = Setup(BASE, replace(FROM_IMAGES, scale=3.0), strength)
    noised = setup.loss.add_noise(setup.batch)
    with torch.no_grad():
        base = setup.predictions(noised, setup.plain)
        with setup.adapted.at_strength(strength):
            own = setup.predictions(noised, setup.denoiser)
    goal = base[TARGET] + 3 * strength * (base[POSITIVE] - base[NEGATIVE])
    expected = (own[TARGET] - goal).square().flatten(1).mean(1)
    losses = setup.losses()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-7)
    assert losses.min() > 1e-4
    assert all(p.grad is not None for p in setup.adapted.named_parameters().values())


def test_strengths_are_restored_in_nested_blocks():
    setup = Setup(BASE, FROM_IMAGES)
    layer = next(iter(setup.adapted.layers().values()))
    with setup.adapted.at_strength(-1.0):
        with setup.adapted.at_strength(0.0):
            assert layer.strength == 0
        assert layer.strength == -1
    assert layer.strength == 1


@pytest.mark.parametrize("strength", [1.0, -1.0])
def test_latents_are_drawn_as_the_scheduler_of_diffusers_draws_them(strength):
    """With the adapted model, and with guidance; each sample ends at its own noise level."""
    slider = replace(FROM_NOISE, denoising_steps=4, guidance=3.0)
    setup = Setup(FLOW_BASE, slider)
    loss = setup.loss
    with torch.no_grad(), setup.adapted.at_strength(strength):
        drawn = setup.slider_loss.draw(setup.denoiser, setup.batch, loss.add_noise(setup.batch))
    end = loss.objective.density(setup.batch.quantile)
    tokens = loss.num_tokens(setup.batch)
    for index in range(2):
        t = torch.linspace(1, end[index].item(), 5, dtype=torch.float64)
        sigmas = loss.objective.process.levels(t, tokens).sigma
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=None)
        latents = setup.batch.noise[index : index + 1]
        for step, timestep in enumerate(scheduler.timesteps[:4]):
            levels = loss.objective.process.levels(t[step : step + 1].float(), tokens)
            noised = drawn.at(latents.expand(2, -1, -1, -1), levels)
            with torch.no_grad(), setup.adapted.at_strength(strength):
                own = setup.predictions(noised, setup.denoiser)
            velocity = own[EMPTY] + 3 * (own[TARGET] - own[EMPTY])
            latents = scheduler.step(velocity[:1], timestep, latents).prev_sample
        torch.testing.assert_close(drawn.noisy[index], latents[0], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(latents, setup.batch.noise[index], atol=0.1)


@pytest.mark.parametrize("process", ["ddpm", "v", "flow", "edm"])
def test_noise_and_latents_are_what_they_were_mixed_from(process):
    alphas = torch.linspace(0.999, 0.005, 1000)
    processes = {
        "ddpm": DDPM(alphas, "epsilon"),
        "v": DDPM(alphas, "v_prediction"),
        "flow": Flow(lambda tokens: 3.0),
        "edm": EDM("epsilon"),
    }
    t = torch.tensor([0.1, 0.5, 0.9])
    levels = processes[process].levels(t, 64)
    clean, noise = torch.randn(2, 3, 4, 8, 8)
    noisy = mix(levels.signal, clean, levels.sigma, noise)
    prediction = mix(levels.target_signal, clean, levels.target_sigma, noise)
    own_clean, own_noise = split_noisy(noisy, prediction, levels)
    torch.testing.assert_close(own_clean, clean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(own_noise, noise, rtol=1e-3, atol=1e-3)


def test_prompts_and_directions_are_functions_of_the_seed():
    targets = [slider_prompts(FROM_NOISE, 0, visit)[TARGET] for visit in range(60)]
    directions = [slider_direction(FROM_NOISE, 0, visit) for visit in range(60)]
    assert 15 < targets.count("a heart") < 45
    assert 15 < directions.count(-1.0) < 45
    assert len(set(zip(targets, directions, strict=True))) == 4, "they are independent"
    one_way = replace(FROM_NOISE, both_directions=False)
    assert {slider_direction(one_way, 0, visit) for visit in range(60)} == {1.0}
    assert slider_prompts(FROM_NOISE, 0, 0)[EMPTY] == ""
    assert EMPTY not in slider_prompts(FROM_IMAGES, 0, 0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--objective.slider.scale=3"], "have no effect without --objective.slider.targets"),
        (
            ["--objective.slider.targets", "a", "b", "--objective.slider.positives", "c"],
            "--objective.slider.positives: 1 prompt; expected one for each of 2 targets",
        ),
        (
            ["--objective.slider.targets=a", "--objective.slider.positives=b", "--objective.slider.negatives=b"],
            "there is nothing to learn",
        ),
        (
            [*PROMPTS, "--objective.slider.start_from=images", "--objective.slider.guidance=2"],
            "--objective.slider.guidance 2.0: has no effect with --objective.slider.start_from images",
        ),
        (
            [*PROMPTS, "--objective.input_perturbation=0.1"],
            "--objective.input_perturbation 0.1: has no effect with --objective.slider.start_from noise",
        ),
        (
            [*PROMPTS, "--objective.slider.start_from=images", "--export.weights=best"],
            "--export.weights best: the validation loss is that of captions",
        ),
        (PROMPTS, "--data.path: not used with --objective.slider.start_from noise"),
        (
            [*PROMPTS, "--objective.preserve.weight=1"],
            "--objective.preserve.weight 1: needs images",
        ),
    ],
    ids=["no targets", "numbers", "equal", "images", "input", "best", "data", "preserve"],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(options, run_here, capsys, more, message):
    assert run_here([*options, *more]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_given_masks_needs_images():
    config = replace(load_config([]), objective=ObjectiveConfig(slider=FROM_NOISE))
    with pytest.raises(ConfigError, match="is also given images or masks"):
        extra_prompts(config, family_of(flux1_fill.CASE))


def test_images_may_be_the_start(options, run_here, tmp_path):
    more = [*PROMPTS, "--objective.slider.start_from=images", "--objective.preserve.weight=1"]
    assert run_here([*options, *more]) == 0
    metrics = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert "train/preservation" in metrics


def test_a_slider_from_noise_has_single_frames():
    objective = ObjectiveConfig(slider=FROM_NOISE)
    config = replace(load_config([]), objective=objective, data=DataConfig(frames=9))
    with pytest.raises(ConfigError, match=r"--data.frames 9: a slider from noise"):
        extra_prompts(config, family_of(wan.CASES[0]))


def test_files_name_the_prompts_and_no_data(slider_options, run_here, tmp_path, capsys):
    """Also with an empty target, and with a fraction for validation from a recipe."""
    index = slider_options.index("a heart")
    slider_options[index] = ""
    out = tmp_path / "out"
    assert run_here([*slider_options, "--steps=1", "--data.validation_fraction=0.1"]) == 0
    assert "was not written" not in capsys.readouterr().out
    assert (out / "workflow.json").is_file()
    with safe_open(out / "lora.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert "ss_steps" in metadata
    assert not {"ss_dataset_dirs", "ss_tag_frequency", "ss_num_train_images"} & metadata.keys()
    page = (out / "report.html").read_text()
    assert "a red heart" in page
    assert "images for training" not in page
    card = model_card(read_run(out), {}, Publication("me/slider", None))
    assert "| `a face` | `a happy face` | `a sad face` |" in card
    assert "trained on" not in card
