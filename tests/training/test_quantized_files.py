"""Runs on models whose files are quantized: the same, bit for bit, as runs on plain files of the same values."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.family_cases import cases, folder_of, native_tensors
from helpers.memory_counts import assert_planned
from helpers.quantized_files import write_gguf, write_scaled
from helpers.runs import assert_same_result
from safetensors.torch import load_file, save_file

from common.errors import ConfigError
from training import build
from training.cli import load_config

FLUX = next(case for case in cases() if str(case) == "flux1-dev")
KINDS = ("gguf", "fp8")
ALGORITHMS = ("LoRA", "DoRA", "LoKr", "OFT")
QUANTIZED, PLAIN = "quantized", "plain"


@pytest.fixture(params=KINDS)
def files(request, tmp_path) -> dict[str, Path]:
    """A quantized file, and a plain one of its values."""
    tensors = native_tensors(FLUX, "model.diffusion_model.")
    folder = tmp_path / "models"
    folder.mkdir()
    if request.param == "gguf":
        path = folder / "model.gguf"
        values = write_gguf(path, tensors, "Q8_0")
    else:
        path = folder / "model.safetensors"
        values = write_scaled(path, tensors)
    plain = folder / "plain.safetensors"
    save_file({name: value.contiguous() for name, value in values.items()}, plain)
    return {QUANTIZED: path, PLAIN: plain}


@pytest.fixture
def model(options) -> list[str]:
    """Options of a run on the family, without the model's path."""
    replaced = ("--model.path", "--data.resolution", "--output_dir", "--adapter.targets")
    kept = [option for option in options if not option.startswith(replaced)]
    return [
        *kept,
        f"--model.config={folder_of(FLUX)}",
        "--data.resolution=32",
        "--training_dtype=bf16",
        "--gradient_checkpointing",
        "--checkpoint_depth=1",
        "--adapter.targets=all",
    ]


@pytest.mark.parametrize(
    ("algorithm", "offload"),
    [
        ("LoRA", "all"),
        ("LoKr", "0"),
        *[
            pytest.param(name, offload, marks=pytest.mark.long)
            for name in ALGORITHMS
            for offload in ("0", "all")
        ],
    ],
)
def test_the_losses_are_those_of_the_plain_file(
    files, model, run_here, tmp_path, algorithm, offload
):
    for name, path in files.items():
        more = [f"--model.path={path}", f"--output_dir={tmp_path / name}"]
        more += [f"--algorithm={algorithm}", f"--memory.offload_blocks={offload}"]
        assert run_here([*model, *more]) == 0
    assert_same_result(tmp_path / QUANTIZED, tmp_path / PLAIN)


def test_a_resumed_run_is_the_same_and_is_merged_into_plain_weights(
    files, model, run_here, tmp_path
):
    options = [option for option in model if option != "--no_preview"]
    options += [f"--model.path={files[QUANTIZED]}", "--preview", "--sample.num_inference_steps=1"]
    options += ["--sample.prompts", "cat"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_here([*options, f"--output_dir={whole}", "--export.merged_model"]) == 0
    for steps in (2, 6):
        assert run_here([*options, f"--output_dir={parts}", f"--steps={steps}"]) == 0
    assert_same_result(whole, parts)
    assert (whole / "preview.png").read_bytes() == (parts / "preview.png").read_bytes()
    (file,) = (whole / "model_with_lora" / "transformer").glob("*.safetensors")
    assert {weight.dtype for weight in load_file(file).values()} == {torch.bfloat16}


def test_a_step_takes_the_planned_memory(files, model, run_here, tmp_path):
    options = [*model, f"--model.path={files[QUANTIZED]}", f"--output_dir={tmp_path / 'out'}"]
    assert_planned(run_here, options)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_shard_are_refused(files, model, monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    path = files[QUANTIZED]
    config = load_config([*model, f"--model.path={path}"])
    with pytest.raises(ConfigError) as caught:
        build.load_family(config)
    message = str(caught.value)
    assert (
        f"--model.path {path}: has quantized weights, with which {engine} does not work" in message
    )
    assert "Use ddp.yaml, or a model in bf16" in message


def test_compilation_is_refused(files, model, run_here, tmp_path, capsys):
    options = [*model, f"--model.path={files[QUANTIZED]}", f"--output_dir={tmp_path / 'out'}"]
    assert run_here([*options, "--compile=blocks"]) == 2
    message = capsys.readouterr().err
    assert "with which --compile blocks does not work. Use --compile none" in message


def test_the_summary_and_the_plan_name_the_format(files, model, run_here, tmp_path, capsys):
    options = [*model, f"--model.path={files[QUANTIZED]}", f"--output_dir={tmp_path / 'out'}"]
    assert run_here(options) == 0
    name = "Q8_0" if files[QUANTIZED].suffix == ".gguf" else "fp8"
    assert f"those of blocks stored in {name}" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    assert run_here(["plan", *options]) == 0
    assert "base in the file's format" in capsys.readouterr().out
