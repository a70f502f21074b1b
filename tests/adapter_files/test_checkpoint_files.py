"""The weights of a checkpoint are adapter files, which the tools and further runs read at their strength."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.adapter_file_cases import SPECS, on_layers
from helpers.project import BASE, TWEMOJI
from helpers.runs import adapter, assert_same
from helpers.tool_cases import assert_same_updates, metadata_of, run
from safetensors.torch import load_file, save_file

from training.checkpoints.state import ADAPTER_FILE, BEST_FILE, EMA_FILE, SavedState, to_files

AVERAGED = ["--rank=8", "--adapter.alpha=1", "--ema.decay=0.7", "--learning_rate=1e-2", "--validation.every=3",
            f"--data.validation_path={TWEMOJI / 'validation'}", "--validation.noise_levels", "0.5"]  # fmt: skip


def state_at(step: int, best_step: int) -> SavedState:
    """Return the state of a run that continues an adapter of 3 steps."""
    return SavedState(
        step, 9, 9, 1, 1, {"steps of the existing LoRA": 3}, 0.0, "", {}, best_step=best_step
    )


@torch.no_grad()
@pytest.mark.parametrize("case", SPECS)
def test_the_tools_read_a_checkpoint_at_its_strength(case, tmp_path):
    """The EMA is of what is trained alone: here some layers are frozen."""
    adapted = on_layers(case)
    adapted.layers()["conv_in"].requires_grad_(False)
    state, averaged = (
        adapted.state_dict(),
        {n: p.detach() * 0.9 for n, p in adapted.named_parameters().items()},
    )
    assert averaged.keys() < state.keys()
    weights = {
        ADAPTER_FILE: state,
        EMA_FILE: averaged,
        BEST_FILE: {name: tensor * 0.8 for name, tensor in state.items()},
    }
    files = to_files(state_at(5, best_step=4), weights, adapted.alphas(), {})
    for name, steps in ((ADAPTER_FILE, "8"), (EMA_FILE, "8"), (BEST_FILE, "7")):
        path, out = tmp_path / name, tmp_path / f"converted_{name}"
        path.write_bytes(files[name])
        adapted.load_state_dict({**state, **weights[name]})
        assert_same_updates(path, adapted)
        assert run("inspect", path, "--model", BASE) == 0
        assert run("convert", path, out, "--format", "kohya", "--model", BASE) == 0
        assert_same_updates(out, adapted, 5e-6)
        assert metadata_of(out)["train_lora.total_steps"] == steps


def test_a_converted_checkpoint_is_what_the_run_exports(options, run_here, tmp_path, capsys):
    assert run_here([*options, *AVERAGED, "--checkpoint.keep_best"]) == 0
    (newest,) = (tmp_path / "out" / "checkpoints").iterdir()
    for name, exported in ((ADAPTER_FILE, "lora.raw"), (EMA_FILE, "lora")):
        out = tmp_path / f"converted_{name}"
        assert run("convert", newest / name, out, "--format", "kohya", "--model", BASE) == 0
        assert_same(load_file(out), load_file(tmp_path / "out" / f"{exported}.safetensors"))
    capsys.readouterr()
    assert run("inspect", newest / BEST_FILE) == 0
    assert re.search(r"all +\d+ +LoRA +8 +1 +", capsys.readouterr().out)


def test_a_run_goes_on_from_a_checkpoint_of_another(options, run_here, tmp_path):
    assert run_here([*options, *AVERAGED, "--adapter.init=pissa"]) == 0
    (newest,) = (tmp_path / "out" / "checkpoints").iterdir()
    more = [*options, *AVERAGED, f"--output_dir={tmp_path / 'more'}", "--steps=1"]
    assert run_here([*more, f"--existing_lora={newest / EMA_FILE}"]) == 0
    before, after = (
        json.loads((tmp_path / name / "loss.json").read_text()) for name in ("out", "more")
    )
    assert after["validation"][0]["loss"] == pytest.approx(
        before["validation"][-1]["loss"], rel=1e-5
    )
    assert after["total_steps"] == 7


@pytest.mark.parametrize("older", [False, True], ids=["of now", "without alphas"])
def test_a_run_goes_on_bit_for_bit(options, run_here, tmp_path, older):
    best = [*options, *AVERAGED, "--adapter.init=pissa", "--export.weights=best"]
    whole = [*best, f"--output_dir={tmp_path / 'whole'}"]
    assert run_here(whole) == 0
    assert run_here([*best, "--steps=3"]) == 0
    (newest,) = (tmp_path / "out" / "checkpoints").iterdir()
    if older:
        take_away_alphas(newest)
    assert run_here(best) == 0
    assert_same(adapter(tmp_path / "whole"), adapter(tmp_path / "out"))
    there, here = (next((tmp_path / name / "checkpoints").glob("*6")) for name in ("whole", "out"))
    for name in (ADAPTER_FILE, EMA_FILE, BEST_FILE):
        assert_same(load_file(there / name), load_file(here / name))


def take_away_alphas(checkpoint: Path) -> None:
    """Leaves what was written before these files said their strength: the EMA alone, without what is not trained."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in (ADAPTER_FILE, EMA_FILE, BEST_FILE):
        tensors = {
            key: tensor
            for key, tensor in load_file(checkpoint / name).items()
            if not key.endswith(".alpha")
        }
        if name == EMA_FILE:
            tensors = {key: tensor for key, tensor in tensors.items() if "initial" not in key}
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
        save_file(tensors, checkpoint / name)
        data = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
