"""Whole runs with every algorithm: what is trained is exported, continued and resumed as the same adapter."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_algos import ALGORITHMS

STRONG = [
    "--learning_rate=1e-2",
    "--adapter.targets=attention",
    "conv_.*",
    "--data.validation_fraction=0.25",
]
EXTRA = ["--adapter.train_norms", "--adapter.train_biases"]


def losses(folder: Path) -> list[float]:
    """The validation losses of a run."""
    return [entry["loss"] for entry in json.loads((folder / "loss.json").read_text())["validation"]]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_learns_and_is_continued_where_it_ended(algorithm, options, run_here, tmp_path):
    first, second = tmp_path / "out", tmp_path / "more"
    run = [
        *options,
        *STRONG,
        *EXTRA,
        f"--algorithm={algorithm}",
        "--export.formats",
        "comfyui",
        "kohya",
    ]
    blocks = ["--adapter.block_size=28"] if algorithm in ("OFT", "BOFT") else []
    assert run_here([*run, "--rank=2", *blocks]) == 0
    before, after = losses(first)[0], losses(first)[-1]
    assert abs(after - before) > 1e-4
    for name in ("lora.safetensors", "lora.kohya.safetensors"):
        again = [
            *run,
            f"--existing_lora={first / name}",
            f"--output_dir={second}",
            "--steps=1",
            "--overwrite",
        ]
        assert run_here(again) == 0
        assert losses(second)[0] == pytest.approx(after, rel=1e-6)
    assert metadata(second / "lora.safetensors")["train_lora.total_steps"] == "7"
    assert metadata(first / "lora.safetensors")["ss_network_module"] == (
        "networks.lora" if algorithm in ("LoRA", "DoRA") and not EXTRA else "lycoris.kohya"
    )


@pytest.mark.parametrize("how", ["full", "lora-svd", "lora-exact"])
def test_an_adapter_is_exported_as_another_algorithms(how, options, run_here, tmp_path, capsys):
    run = [
        *options,
        *STRONG,
        "--algorithm=LoKr",
        "--rank=1",
        f"--export.convert={how}",
        "--export.svd_rank=512",
    ]
    file_format = "comfyui" if how == "full" else "diffusers"
    assert run_here([*run, f"--export.formats={file_format}", "--export.trigger_words=a face"]) == 0
    path = tmp_path / "out" / "lora.safetensors"
    kinds = {key.rsplit(".", 2)[-2 if key.endswith("weight") else -1] for key in load_file(path)}
    assert kinds == ({"diff"} if how == "full" else {"lora_A", "lora_B"})
    assert metadata(path)["modelspec.trigger_phrase"] == "a face"
    assert ("lora-svd of rank 512: error" in capsys.readouterr().out) == (how == "lora-svd")
    after = losses(tmp_path / "out")[-1]
    more = [
        *options,
        *STRONG,
        f"--existing_lora={path}",
        f"--output_dir={tmp_path / 'more'}",
        "--steps=1",
    ]
    assert run_here(more) == 0
    assert losses(tmp_path / "more")[0] == pytest.approx(after, rel=1e-5)


def test_one_run_mixes_algorithms_ranks_and_learning_rates(options, run_here, tmp_path, capsys):
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        "bypass_mode: true\nadapter:\n  overrides:\n"
        "  - {pattern: 'mid_block.*', algorithm: LoHa, rank: 2}\n"
        "  - {pattern: 'conv_out', algorithm: OFT, lr_scale: 0.5}\n"
    )
    assert run_here([str(recipe), *options, *STRONG]) == 0
    said = capsys.readouterr().out
    assert "LoHa, rank 2, scaling = alpha / rank = 2 / 2 = 1" in said
    assert "OFT, 1 x 1 blocks of 4, learning rate x 0.5" in said
    assert "LoRA, rank 4, scaling = alpha / rank = 4 / 4 = 1" in said
    kinds = {key.split(".")[1] for key in load_file(tmp_path / "out" / "lora.safetensors")}
    assert kinds == {
        "lora_up",
        "lora_down",
        "alpha",
        "oft_blocks",
        *(f"hada_w{i}_{s}" for i in (1, 2) for s in "ab"),
    }


@pytest.mark.parametrize(
    "more", [["--adapter.init=pissa"], ["--adapter.dropout=0.3", "--adapter.rank_dropout=0.3"]]
)
def test_a_resumed_run_is_the_run_that_was_not_stopped(more, options, run_here, tmp_path):
    run = [*options, *STRONG, *more, "--checkpoint.every=3"]
    assert run_here(run) == 0
    stopped = [*run, f"--output_dir={tmp_path / 'two'}"]
    assert run_here([*stopped, "--steps=3"]) == 0
    assert run_here([*stopped, "--steps=6"]) == 0
    here, there = (load_file(tmp_path / name / "lora.safetensors") for name in ("out", "two"))
    assert here.keys() == there.keys()
    assert all(torch.equal(tensor, there[key]) for key, tensor in here.items())


BAD = {
    "a block that does not fit": (
        ["--algorithm=BOFT", "--adapter.block_size=8"],
        [
            "conv_in: no block_size up to 8 fits its 56 output channels; the smallest block_size that fits is 14"
        ],
    ),
    "an override that matches nothing": (["--overrides"], ["0.pattern = no.*", "matches no layer"]),
    "PEFT's format for a rotation": (
        ["--algorithm=OFT", "--export.formats=peft"],
        ["kohya and comfyui hold everything"],
    ),
    "too many stages": (
        ["--algorithm=BOFT", "--adapter.stages=9"],
        ["conv_in", "stages 9", "at most"],
    ),
    "an odd rank for orthogonal": (
        ["--adapter.init=orthogonal", "--rank=3"],
        ["rank 3; expected an even rank"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_do_not_fit_are_told_with_what_would(
    case, options, run_here, tmp_path, capsys
):
    more, words = BAD[case]
    argv = [*options, *STRONG]
    if more == ["--overrides"]:
        recipe = tmp_path / "r.yaml"
        recipe.write_text("adapter:\n  overrides:\n  - {pattern: 'no.*', algorithm: Unknown}\n")
        argv, more = [str(recipe), *argv], []
    assert run_here([*argv, *more]) == 2
    said = capsys.readouterr().err
    assert not [word for word in words if word not in said], said
    assert not (tmp_path / "out" / "loss.json").exists()
    assert "step/s" not in said, "said before anything was trained"
