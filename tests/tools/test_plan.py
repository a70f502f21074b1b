"""The command `plan`: its table, its JSON, the options that it proposes, and its errors."""

import json
import os

import pytest
from helpers.project import BASE, PROJECT

KLEIN = str(PROJECT / "recipes" / "flux2_klein.yaml")
GIB = 2**30


def plan(run_here, capsys, *options: str, code: int = 0) -> str:
    assert run_here(["plan", *options]) == code
    return capsys.readouterr().out


def test_a_released_model_is_planned_by_its_hub_id(run_here, capsys):
    """10.3 GB were counted independently of this code, with CUDA's own autocast (without the text of 512 tokens)."""
    values = json.loads(plan(run_here, capsys, KLEIN, "--json"))
    phases = values["phases"]
    assert list(phases) == ["encode captions", "encode images", "train", "validate", "samples"]
    train = phases["train"]
    assert train["total"] == pytest.approx(10.3e9, rel=0.03)
    assert train["base model"] == pytest.approx(2 * 3.876e9, rel=0.001)
    assert train["optimizer"] == pytest.approx(2 * train["adapters"], rel=0.01)
    assert sum(size for name, size in train.items() if name != "total") == train["total"]


def test_the_table_names_the_peak(run_here, capsys):
    out = plan(run_here, capsys, "--device", "cpu")
    lines = out.splitlines()
    assert lines[1].split() == [
        "phase", "base", "model", "text", "encoders", "VAE", "adapters", "gradients", "optimizer", "activations",
        "total",
    ]  # fmt: skip
    assert "Peak: 0.09" in out
    assert "(train)" in out


@pytest.mark.long
def test_options_are_proposed_that_fit(run_here, capsys):
    """The demo takes 90 MiB for a batch of 8; 60 MiB are left beside what CUDA itself takes."""
    budget = "1.06GB"
    values = json.loads(plan(run_here, capsys, "--memory.budget", budget, "--json"))["budget"]
    assert values["fits"]
    assert values["options"]["gradient_checkpointing"] is True
    peak = max(phase["total"] for phase in values["phases"].values())
    assert 0.8 * 0.06 * GIB < peak <= 0.06 * GIB


@pytest.mark.long
def test_without_any_option_that_fits_the_least_is_named(run_here, capsys):
    small = ["--batch_size", "1", "--no_preview", "--adapter.targets", "attention"]
    out = plan(run_here, capsys, *small, "--memory.budget", "1.005GB", code=2)
    without, _, with_changes = out.partition(
        "With options that change the result (--memory.allow permits them):"
    )
    assert "Does not fit into 1.005 GiB" in without
    assert "--memory.offload_blocks all" in without
    assert "--model.quantization" not in without
    assert "--model.quantization nf4" in with_changes
    assert "These change the result: " in with_changes


def test_a_budget_that_is_large_changes_nothing(run_here, capsys):
    out = plan(run_here, capsys, "--memory.budget", "80GB", "--no_gradient_checkpointing")
    assert "Fits into 80 GiB without changes." in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory.budget=AUTO"], "expected none, check, auto, or a size such as 12GB"),
        (["--memory.budget=much"], "expected none, check, auto, or a size such as 12GB"),
        (["--memory.budget=1.2.3GB"], "expected none, check, auto, or a size such as 12GB"),
        (["--memory.budget=0GB"], "expected none, check, auto, or a size such as 12GB"),
        (["--memory.budget=auto"], "a plan looks at no GPU; expected a size such as 12GB"),
        (
            ["--model.path=a/b"],
            "--model.path a/b: the configuration of this model is not stored here",
        ),
        (["--existing_lora=lora.safetensors"], "--existing_lora: cannot be planned yet"),
        (["--data.frames=5"], "--data.frames 5: this model makes images"),
        (["--model.train_text_encoder"], "--model.train_text_encoder: cannot be planned yet"),
    ],
)
def test_mistakes_are_named(options, message, run_here, capsys):
    assert run_here(["plan", *options]) == 2
    assert message in capsys.readouterr().err


def test_an_optimizer_that_reads_values_is_named(run_here, capsys):
    assert run_here(["plan", "--optimizer=Prodigy"]) == 2
    assert "--optimizer Prodigy: cannot be planned" in capsys.readouterr().err


def test_the_plan_needs_no_data_and_leaves_nothing(run_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "no")
    assert run_here(["plan", "--data.path=nowhere", f"--model.path={BASE}", "--no_preview"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert os.environ["ACCELERATE_USE_CPU"] == "no"


def test_captions_in_layers_take_little(run_here, capsys):
    options = [KLEIN, "--json", "--model.text_encoder_placement"]
    whole = json.loads(plan(run_here, capsys, *options, "device"))["phases"]
    layers = json.loads(plan(run_here, capsys, *options, "layers"))["phases"]
    captions = "encode captions"
    assert layers[captions]["activations"] == whole[captions]["activations"]
    assert layers[captions]["text encoders"] < 0.2 * whole[captions]["text encoders"]
    assert layers["train"] == whole["train"]
    assert layers["samples"] == whole["samples"], "prompts are encoded before"
