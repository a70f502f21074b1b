"""A run plans its memory at its start: it chooses options that fit, or stops before it encodes."""

import json
from unittest import mock

import pytest
from helpers.runs import assert_same_result

from training.memory import run_plan
from training.memory.config import MemoryConfig
from training.memory.run_plan import need_of, too_large

MIB = 2**20
TINY = "0.02GB"
"""Too little for the activations of a step, and enough if these are computed again."""


TIGHT = "0.0145GB"
"""Too little for a base that is not quantized."""


@pytest.fixture
def small(options) -> list[str]:
    return [*options, "--rank=1"]


def test_a_budget_chooses_options_that_leave_the_result(small, run_here, tmp_path, capsys):
    plain, fitted = tmp_path / "plain", tmp_path / "fitted"
    assert run_here([*small, f"--output_dir={plain}"]) == 0
    assert "memory  " not in capsys.readouterr().out
    assert run_here([*small, f"--output_dir={fitted}", f"--memory.budget={TINY}"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("memory      options for")]
    assert "--gradient_checkpointing" in line
    assert "are recomputed in the backward pass" in out
    assert_same_result(plain, fitted)


def test_a_run_that_does_not_fit_stops_before_it_encodes(small, run_here, tmp_path, capsys):
    cache = tmp_path / "empty"
    options = [*small, f"--data.cache_dir={cache}", "--data.encode_pixels=4096"]
    with mock.patch.object(run_plan, "budget_of", return_value=20 * MIB):  # of a GPU
        assert run_here(options) == 2
        _, _, err = capsys.readouterr().err.rpartition("error: ")  # after announcements
        with mock.patch.object(run_plan, "run_plan_command") as command:  # the plan is kept
            assert run_here(options) == 2
    command.assert_not_called()
    assert capsys.readouterr().err == f"error: {err}"
    assert "--memory.budget check: the plan needs" in err
    assert "It fits with: --gradient_checkpointing" in err
    assert "Use --memory.budget auto to change options" in err
    assert not list(cache.glob("media-*"))


def test_a_run_that_cannot_be_planned(small, lora_file, run_here, capsys):
    options = [*small, f"--existing_lora={lora_file}"]
    assert run_here([*options, "--memory.budget=9GB"]) == 2
    assert "--existing_lora: cannot be planned yet" in capsys.readouterr().err
    with mock.patch.object(run_plan, "budget_of", return_value=20 * MIB):
        assert run_here(options) == 0
    assert "note: the memory of this run is not planned: " in capsys.readouterr().out


@pytest.mark.long
def test_a_run_keeps_the_result_changes_that_it_chose(small, run_here, tmp_path, capsys):
    """The same command resumes it, and a smaller budget too, bit for bit."""
    options = [
        *small,
        "--gradient_checkpointing",
        "--model.quantization=none",
        "--memory.allow",
        "nf4",
    ]
    plain = [
        *small,
        "--gradient_checkpointing",
        "--model.quantization=nf4",
        f"--output_dir={tmp_path / 'plain'}",
    ]
    assert run_here(plain) == 0
    capsys.readouterr()
    for steps in (2, 6):
        assert run_here([*options, f"--memory.budget={TIGHT}", f"--steps={steps}"]) == 0
        assert "--model.quantization nf4" in capsys.readouterr().out
    assert_same_result(tmp_path / "plain", tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert kept == {"model.quantization": "nf4"}


PLAN = {
    "reserve": 0,
    "phases": {"train": {"total": 9 * run_plan.GIB}, "preview": {"total": 10 * run_plan.GIB}},
    "budget": {"fits": False, "options": {}},
}


def config_of(budget: str) -> mock.Mock:
    return mock.Mock(memory=MemoryConfig(budget=budget))


def test_previews_do_not_count():
    assert need_of(PLAN) == (9 * run_plan.GIB, "train")


def test_errors_name_what_is_left():
    least = {"fits": True, "options": {"model.quantization": "nf4", "preview": False}}
    text = too_large(config_of("8GB"), {**PLAN, "least": least}, 8 * run_plan.GIB)
    assert "8GB: the plan needs 9 GiB (most in: train); the budget is 8 GiB" in text
    assert "changes of the result: --model.quantization nf4 --no_preview" in text
    nothing = too_large(config_of("8GB"), {**PLAN, "least": {"fits": False}}, 8 * run_plan.GIB)
    assert "No options of this trainer make it fit" in nothing
