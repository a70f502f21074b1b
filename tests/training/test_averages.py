"""The weights that a run shows: their EMA, the best of those validated; and the end of what brings nothing."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.project import TWEMOJI, accelerate_launch, script
from helpers.runs import adapter, assert_same, assert_same_adapter
from safetensors import safe_open
from safetensors.torch import load_file

from training.checkpoints.best import best_step, stops_early
from training.config import EmaConfig, ValidationConfig
from training.optim.ema import decay_at

VALIDATED = [f"--data.validation_path={TWEMOJI / 'validation'}", "--validation.noise_levels", "0.3", "0.7",
             "--validation.every=2", "--learning_rate=1e-2"]  # fmt: skip
EMA = ["--ema.decay=0.7", "--learning_rate=1e-2"]
# the first validation is an improvement, and no other can be
NOTHING_BETTER = [*VALIDATED, "--validation.min_delta=100", "--validation.patience=2", "--steps=12"]


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").iterdir())


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def validation(folder: Path) -> dict[int, float]:
    entries = json.loads((folder / "loss.json").read_text())["validation"]
    return {entry["step"]: entry["loss"] for entry in entries}


def test_the_decay_rises_to_the_one_asked_for():
    config = EmaConfig(decay=0.9)
    assert [decay_at(step, config) for step in (1, 2, 8)] == [2 / 11, 3 / 12, 0.5]
    assert decay_at(100, config) == 0.9


def test_the_average_is_that_of_the_weights_of_every_step(options, run_here, tmp_path):
    assert run_here([*options, *EMA, "--checkpoint.every=1", "--checkpoint.keep=9"]) == 0
    assert len(checkpoints(tmp_path / "out")) == 6
    for before, after in pairwise(checkpoints(tmp_path / "out")):
        step = int(after.name[-8:])
        weight, old, new = (load_file(path) for path in (after / "adapter.safetensors", before / "ema.safetensors",
                                                         after / "ema.safetensors"))  # fmt: skip
        assert weight.keys() == new.keys()
        decay = min(0.7, (1 + step) / (10 + step))
        for name in new:
            torch.testing.assert_close(new[name], decay * old[name] + (1 - decay) * weight[name])


def test_average_and_trained_weights_are_both_exported(options, run_here, tmp_path, capsys):
    out, plain = tmp_path / "out", tmp_path / "plain"
    assert run_here([*options, *EMA, *VALIDATED]) == 0
    assert "the adapter has the weights EMA of decay 0.7, after step 6" in capsys.readouterr().out
    assert run_here([*options, *VALIDATED, f"--output_dir={plain}"]) == 0
    raw = load_file(out / "lora.raw.safetensors")
    assert_same(raw, adapter(plain))  # an average changes nothing of the training
    assert any(not tensor.equal(raw[name]) for name, tensor in adapter(out).items())
    assert (
        metadata(out / "lora.safetensors")["train_lora.weights"] == "EMA of decay 0.7, after step 6"
    )
    assert metadata(out / "lora.raw.safetensors")["train_lora.weights"] == "after step 6"
    assert validation(out)[0] == validation(plain)[0]
    assert validation(out)[6] != validation(plain)[6]  # it is the average that is validated
    assert (
        run_here([*options, *EMA, *VALIDATED, "--ema.evaluate_with=raw", "--export.name=other"])
        == 0
    )
    assert_same(load_file(out / "other.safetensors"), raw)
    assert_same(load_file(out / "other.ema.safetensors"), adapter(out))


def test_an_averaged_run_goes_on_bit_for_bit(options, run_here, tmp_path):
    whole = tmp_path / "whole"
    assert run_here([*options, *EMA, f"--output_dir={whole}"]) == 0
    assert run_here([*options, *EMA, "--steps=4"]) == 0
    assert run_here([*options, *EMA]) == 0
    assert_same_adapter(whole, tmp_path / "out")
    assert_same(
        load_file(whole / "lora.raw.safetensors"),
        load_file(tmp_path / "out" / "lora.raw.safetensors"),
    )


HISTORIES = {  # losses at steps 0, 2, 4, ...: patience, least improvement, the best step, whether it is over
    "nothing yet": ([0.5], 2, 0.0, None, False),
    "falls": ([0.5, 0.4, 0.3, 0.2], 2, 0.0, 6, False),
    "the base alone was better": ([0.1, 0.4, 0.3], 2, 0.0, 4, False),
    "rises": ([0.5, 0.4, 0.41, 0.42], 2, 0.0, 2, True),
    "rises, without patience": ([0.5, 0.4, 0.41, 0.42], 0, 0.0, 2, False),
    "rises once": ([0.5, 0.4, 0.41, 0.39, 0.4], 2, 0.0, 6, False),
    "stays": ([0.5, 0.4, 0.4, 0.4], 2, 0.0, 2, True),
    "falls too little": ([0.5, 0.4, 0.39, 0.38], 2, 0.05, 6, True),
    "falls by little, but in all enough": ([0.5, 0.4, 0.37, 0.34, 0.31], 3, 0.05, 8, False),
    "was over before": ([0.5, 0.4, 0.41, 0.42, 0.1], 2, 0.0, 8, True),
    "is not finite": ([0.5, 0.4, float("nan"), float("inf")], 2, 0.0, 2, True),
    "was never finite": ([0.5, float("nan")], 2, 0.0, None, False),
}


@pytest.mark.parametrize("case", HISTORIES)
def test_the_best_step_and_the_end_follow_from_the_losses(case):
    losses, patience, least, best, over = HISTORIES[case]
    history = [{"step": 2 * i, "loss": loss} for i, loss in enumerate(losses)]
    assert best_step(history) == best
    config = ValidationConfig(every=2, patience=patience, min_delta=least)
    assert stops_early(history, config) == over
    history.insert(2, {"step": 3, "loss": 0.0})  # the last of a sitting that was to be shorter
    assert stops_early(history, config) == over


FALLS_AND_RISES = {
    "trained": (["--learning_rate=0.1"], 10),
    "EMA": (["--learning_rate=0.1", "--ema.decay=0.7"], 10),
    "schedule-free": (["--learning_rate=0.1", "--optimizer=ScheduleFreeAdamW"], 10),
}


@pytest.mark.parametrize(
    "case",
    ["EMA", *(pytest.param(name, marks=pytest.mark.long) for name in ("trained", "schedule-free"))],
)
def test_the_best_weights_are_exported(options, run_here, tmp_path, capsys, case):
    """Also by a run that was stopped in between; they are what a run that ended there exports."""
    average, steps = FALLS_AND_RISES[case]
    rising = [*options, *VALIDATED, *average, f"--steps={steps}"]
    best = [*rising, "--export.weights=best", "--preview", "--sample.num_inference_steps=2"]
    assert run_here([*best, "--steps=6"]) == 0
    assert run_here(best) == 0
    out, losses = tmp_path / "out", validation(tmp_path / "out")
    step = min((loss, step) for step, loss in losses.items() if step)[1]
    assert step < steps, losses
    about = metadata(out / "lora.safetensors")
    assert about["train_lora.total_steps"] == str(step)
    assert (
        f"after step {step} of {steps}, which has the lowest validation loss, {losses[step]:.5f}"
        in capsys.readouterr().out
    )
    assert f"after step {step} of {steps}" in about["train_lora.weights"]
    assert run_here([*rising, f"--steps={step}", f"--output_dir={tmp_path / 'short'}"]) == 0
    assert_same_adapter(out, tmp_path / "short")
    assert (tmp_path / "out" / "preview.png").is_file()


def test_the_best_weights_may_be_asked_for_later_if_they_were_kept(
    options, run_here, tmp_path, capsys
):
    rising = [*options, *VALIDATED, "--learning_rate=0.1", "--steps=10"]
    assert run_here(rising) == 0
    assert run_here([*rising, "--export.weights=best"]) == 2
    assert "which has the lowest validation loss so far, were not kept" in capsys.readouterr().err
    kept = [*rising, "--checkpoint.keep_best", f"--output_dir={tmp_path / 'kept'}"]
    assert run_here(kept) == 0
    assert_same_adapter(tmp_path / "out", tmp_path / "kept")
    assert run_here([*kept, "--export.weights=best"]) == 0
    said = json.loads((tmp_path / "kept" / "loss.json").read_text())["validation"]
    assert metadata(tmp_path / "kept" / "lora.safetensors")["ss_steps"] == str(best_step(said))


@pytest.mark.parametrize("other", ["--ema.evaluate_with=raw", "--validation.noise_levels=0.95"])
def test_losses_of_two_kinds_tell_no_best_step(options, run_here, capsys, other):
    kept = [*options, *VALIDATED, "--ema.decay=0.7", "--checkpoint.keep_best", "--steps=4"]
    assert run_here(kept) == 0
    assert run_here([*kept, other, "--steps=6"]) == 2
    assert "and the best step depends on it" in capsys.readouterr().err
    free = [option for option in kept if option != "--checkpoint.keep_best"]
    assert run_here([*free, "--overwrite"]) == 0
    assert run_here([*free, other, "--steps=6"]) == 0


def test_a_run_that_brings_nothing_ends_and_stays_at_its_end(options, run_here, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_here([*options, *NOTHING_BETTER]) == 0
    said = "stopped early at step 6 of 12: 2 validations without improvement"
    assert said in capsys.readouterr().out
    assert [path.name for path in checkpoints(out)] == ["step_00000006"]
    assert json.loads((out / "loss.json").read_text())["total_steps"] == 6
    ended = adapter(out)
    assert run_here([*options, *NOTHING_BETTER]) == 0
    again = capsys.readouterr().out
    assert "resumed at step 6 of 12" in again
    assert said in again
    assert_same(ended, adapter(out))
    assert run_here([*options, *NOTHING_BETTER, "--validation.patience=9"]) == 0
    assert (
        run_here(
            [
                *options,
                *NOTHING_BETTER,
                "--validation.patience=9",
                f"--output_dir={tmp_path / 'whole'}",
            ]
        )
        == 0
    )
    assert sorted(validation(out)) == [0, 2, 4, 6, 8, 10, 12]
    assert_same_adapter(out, tmp_path / "whole")


@pytest.mark.long
def test_all_ranks_end_together_with_the_same_weights(options, tmp_path):
    best = [
        *options,
        *NOTHING_BETTER,
        "--ema.decay=0.7",
        "--export.weights=best",
        "--distributed.rank_check_every=4",
    ]
    launcher = accelerate_launch(
        "--multi_gpu", "--num_machines=1", "--num_processes=2", "--main_process_port=0"
    )
    result = script(best, launcher, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("stopped early at step 6 of 12") == 1
    one = [*best, "--grad_accumulation_steps=2", f"--output_dir={tmp_path / 'one'}"]
    assert script(one).returncode == 0
    assert_same_adapter(tmp_path / "one", tmp_path / "out")


NOT_THERE = {
    "patience": (
        "--validation.patience=2 --validation.every=2",
        "--validation.patience: needs validation images",
    ),
    "best": (
        "--checkpoint.keep_best",
        "--checkpoint.keep_best: needs validation images. Set --data.validation_",
    ),
    "which": ("--export.weights=best", "--export.weights best: needs validation images"),
    "every": ("--validation.patience=2 --data.validation_fraction=0.5", "Set --validation.every"),
}


@pytest.mark.parametrize("case", NOT_THERE)
def test_what_needs_validation_says_so(options, run_here, capsys, case):
    more, said = NOT_THERE[case]
    assert run_here([*options, *more.split()]) == 2
    assert said in capsys.readouterr().err
