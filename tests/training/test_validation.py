"""Validation: of the same images at the same levels it is one number, and of others it is another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.project import TWEMOJI
from safetensors.torch import load_file

import training.validation
from common.errors import ConfigError
from training.config import TrainConfig
from training.reporting.history import History, ValidationSeries
from training.reporting.loss_files import loss_json
from training.run_folder import locked_folder

LEVELS = ["--validation.noise_levels", "0.3", "0.7"]


@pytest.fixture
def held_out(tmp_path) -> Path:
    """Four held-out images."""
    folder = tmp_path / "held_out"
    folder.mkdir()
    for path in sorted((TWEMOJI / "validation").iterdir())[:8]:
        shutil.copy(path, folder)
    assert len(list(folder.glob("*.png"))) == 4
    return folder


@pytest.fixture
def validated(options, held_out) -> list[str]:
    return [
        *options,
        *LEVELS,
        f"--data.validation_path={held_out}",
        "--steps=4",
        "--validation.every=2",
    ]


def losses(folder: Path, name: str = "validation") -> dict[int, float]:
    return {
        entry["step"]: entry["loss"]
        for entry in json.loads((folder / "loss.json").read_text())[name]
    }


def test_large_latents_are_validated_few_at_a_time(validated, run_here, tmp_path, monkeypatch):
    shapes, make = [], training.validation.make_batch

    def seen(*args, **kwargs):
        batch = make(*args, **kwargs)
        shapes.append(batch.latents.shape)
        return batch

    monkeypatch.setattr(training.validation, "make_batch", seen)
    found = {}
    for name, samples, sizes in (
        ("many", None, {8}),
        ("few", 3, {3, 2}),
        ("as in training", 0, {2}),
    ):
        if samples is not None:
            monkeypatch.setattr(
                training.validation, "MAX_ELEMENTS", samples * shapes[0].numel() // 8
            )
        shapes.clear()
        assert run_here([*validated, f"--output_dir={tmp_path / name}"]) == 0
        found[name] = list(losses(tmp_path / name).values())
        assert {shape[0] for shape in shapes} == sizes
    assert found["few"] == pytest.approx(found["many"], rel=1e-5)
    assert found["as in training"] == pytest.approx(found["many"], rel=1e-5)


def poisoned(monkeypatch, first_call: int) -> None:
    """A held-out row has latents that are not finite, from that batch on."""
    make, calls = training.validation.make_batch, []

    def broken(dataset, rows, *args, **kwargs):
        calls.append(rows)
        batch = make(dataset, rows, *args, **kwargs)
        if len(calls) >= first_call:
            batch.latents[torch.tensor(rows) == 2] = float("nan")
        return batch

    monkeypatch.setattr(training.validation, "make_batch", broken)


def test_a_held_out_image_that_is_not_finite_is_named_before_the_first_step(
    validated, run_here, held_out, monkeypatch, capsys
):
    poisoned(monkeypatch, 1)
    assert run_here(validated) == 1
    error = capsys.readouterr().err
    assert "the validation loss at step 0 is not finite for " in error
    assert sum(path.name in error for path in held_out.glob("*.png")) == 1


def test_a_later_validation_that_is_not_finite_is_said_and_stops_nothing(
    validated, run_here, tmp_path, monkeypatch, capsys
):
    poisoned(monkeypatch, 2)
    assert run_here([*validated, "--export.weights=best"]) == 0
    out = capsys.readouterr().out
    assert "the validation loss at step 2 is not finite for " in out
    assert "no validation loss was finite: the weights after step 4 are exported" in out
    assert losses(tmp_path / "out").keys() == {0, 2, 4}
    assert losses(tmp_path / "out")[2] is None, "JSON has no NaN"


def test_other_held_out_images_begin_another_history(
    validated, run_here, held_out, tmp_path, capsys
):
    best = [*validated, "--export.weights=best", "--validation.patience=2"]
    assert run_here(best) == 0
    before = losses(tmp_path / "out")
    image = next(held_out.glob("*.png"))
    image.unlink()
    image.with_suffix(".txt").unlink()
    assert run_here([*best, "--steps=8"]) == 0
    assert "a new series of validation losses begins" in capsys.readouterr().out
    assert losses(tmp_path / "out").keys() == {4, 6, 8}
    assert losses(tmp_path / "out", "earlier_validation") == before
    assert run_here([*best, "--steps=10"]) == 0
    assert "a new series" not in capsys.readouterr().out
    assert losses(tmp_path / "out").keys() == {4, 6, 8, 10}


def test_a_run_without_validation_in_between_forgets_none(validated, run_here, tmp_path):
    assert run_here(validated) == 0
    without = [option for option in validated if "validation_path" not in option]
    assert run_here([*without, "--steps=6"]) == 0
    assert losses(tmp_path / "out").keys() == {0, 2, 4}
    assert run_here([*validated, "--steps=8"]) == 0
    assert losses(tmp_path / "out").keys() == {0, 2, 4, 6, 8}


def test_loss_json_is_json_whatever_the_losses():
    history = History(
        1,
        validation_series=[
            ValidationSeries("", [{"step": 0, "loss": float("nan"), "quantile_0.5": float("inf")}])
        ],
    )
    found = json.loads(loss_json(history, 1), parse_constant=pytest.fail)
    assert found["validation"] == [{"step": 0, "loss": None, "quantile_0.5": None}]


def test_files_of_other_weights_of_an_earlier_run_are_pointed_out(
    options, run_here, tmp_path, capsys
):
    assert run_here([*options, "--ema.decay=0.7"]) == 0
    assert "is from an earlier run" not in capsys.readouterr().out
    raw = tmp_path / "out" / "lora.raw.safetensors"
    before = load_file(raw)
    assert run_here([*options, "--ema.decay=0.7", "--ema.evaluate_with=raw", "--steps=8"]) == 0
    assert f"note: {raw} is from an earlier run" in capsys.readouterr().out
    assert all(tensor.equal(before[name]) for name, tensor in load_file(raw).items())


def test_a_run_that_waited_for_another_looks_again_at_what_that_has_left(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path), resume="never")
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    with (
        pytest.raises(ConfigError, match="--resume never would lose"),
        locked_folder(config, 0, print),
    ):
        pytest.fail("it is not its own")
