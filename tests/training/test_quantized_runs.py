"""Runs on a quantized base: close to a run on the plain base, resumed bit for bit, refused where nobody tried it."""

import json
from pathlib import Path

import pytest
import torch
from helpers.project import BASE
from safetensors.torch import load_file

from models.quantization import FORMATS

MAX_DIFFERENCES = {"fp8": 0.01, "int8": 0.01, "nf4": 0.05}
"""Format -> relative difference of the losses from those of the plain base."""
ADAPTER = "lora.safetensors"


def losses(folder: Path) -> list[float]:
    return json.loads((folder / "loss.json").read_text())["loss_per_step"]


@pytest.fixture
def quantized(options) -> list[str]:
    return [*options, "--training_dtype=bf16", "--gradient_checkpointing"]


def test_losses_are_close_to_those_of_the_plain_base(quantized, run_here, tmp_path):
    assert run_here([*quantized, f"--output_dir={tmp_path / 'none'}"]) == 0
    expected = losses(tmp_path / "none")
    for name in FORMATS:
        folder = tmp_path / name
        assert run_here([*quantized, f"--model.quantization={name}", f"--output_dir={folder}"]) == 0
        differences = [abs(a / b - 1) for a, b in zip(losses(folder), expected, strict=True)]
        assert 0 < max(differences) < MAX_DIFFERENCES[name], name


def test_a_resumed_run_is_the_same_and_draws_previews(quantized, run_here, tmp_path):
    options = [option for option in quantized if option != "--no_preview"]
    options += [
        "--model.quantization=nf4",
        "--sample.num_inference_steps=2",
        "--sample.prompts",
        "cat",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_here([*options, f"--output_dir={whole}"]) == 0
    for steps in (2, 6):
        assert run_here([*options, f"--output_dir={parts}", f"--steps={steps}"]) == 0
    first, second = load_file(whole / ADAPTER), load_file(parts / ADAPTER)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (whole / "preview.png").read_bytes() == (parts / "preview.png").read_bytes()


def test_the_adapter_is_merged_into_the_plain_weights(quantized, run_here, tmp_path):
    from diffusers import UNet2DConditionModel

    merged = ["--model.quantization=nf4", "--export.merged_model"]
    assert run_here([*quantized, *merged]) == 0
    model = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "model_with_lora" / "unet")
    base = UNet2DConditionModel.from_pretrained(BASE / "unet").state_dict()
    changed = [
        key for key, value in model.state_dict().items() if not torch.equal(value, base[key])
    ]
    assert changed
    assert all(".attn" in key for key in changed), "all other weights are exactly the base's"


def test_another_format_is_another_run(quantized, run_here, capsys):
    assert run_here([*quantized, "--model.quantization=nf4"]) == 0
    assert run_here([*quantized, "--model.quantization=int8", "--steps=8"]) == 2
    assert "model.quantization is nf4 there, int8 here" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_shard_are_refused(engine, options, run_here, monkeypatch, capsys):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    assert run_here([*options, "--model.quantization=nf4"]) == 2
    assert f"{engine}, which does not support --model.quantization" in capsys.readouterr().err


def test_compilation_is_refused(options, run_here, capsys):
    assert run_here([*options, "--model.quantization=nf4", "--compile=blocks"]) == 2
    assert "--compile blocks: does not work with --model.quantization" in capsys.readouterr().err
