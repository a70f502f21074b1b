"""No part of a run is silent for long: what takes time says what it is."""

import io
import re
import time
from contextlib import redirect_stderr

import pytest

from common import announce, hashing
from data.precompute.build import DatasetBuilder
from models.diffusers_family import DiffusersFamily
from training import build, callbacks, trainer
from training.checkpoints.writer import CheckpointWriter
from training.sampling.renderer import SampleRenderer

SLOW = [
    (hashing, "sha256_of_file"),
    (DatasetBuilder, "_check_contents"),
    (DiffusersFamily, "load_encoders"),
    (build, "load_denoiser"),
    (build, "attach_adapters"),
    (build, "build_engine"),
    (trainer.Trainer, "train_step"),
    (callbacks, "validate"),
    (SampleRenderer, "_draw"),
    (CheckpointWriter, "wait"),
]
"""Functions that take minutes with a large model or a slow disk."""
EXPECTED = [
    "hashing .*, which is done once",
    "checking the images",
    "loading the text encoders",
    "loading the VAE",
    "loading the base model",
    "attaching the adapter",
    "moving the model to the device",
    "validating",
    "the first step",
    "writing the checkpoint",
    "drawing 2 samples",
]


def slowed(function):
    def slow(*arguments, **options):
        time.sleep(0.2)
        return function(*arguments, **options)

    return slow


def test_a_slow_run_says_what_it_does(options, run_here, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(announce, "DELAY", 0.1)
    for owner, name in SLOW:
        monkeypatch.setattr(owner, name, slowed(getattr(owner, name)))
    more = [f"--data.cache_dir={tmp_path / 'empty'}", "--steps=2", "--data.validation_fraction=0.3"]
    more += ["--preview", "--sample.prompts", "a cat", "--sample.num_inference_steps=1"]
    assert run_here([*options, *more]) == 0
    lines = re.split(r"[\r\n]+", capfd.readouterr().err)
    begun = [line.removesuffix(" ...") for line in lines if line.endswith(" ...")]
    ended = [line.split(": took ")[0] for line in lines if ": took " in line]
    assert sorted(begun) == sorted(ended), "each says how long it took"
    positions = []
    for pattern in EXPECTED:
        matches = [number for number, line in enumerate(begun) if re.fullmatch(pattern, line)]
        assert matches, (pattern, begun)
        positions.append(matches[0])
    assert positions == sorted(positions), begun


def test_what_is_trained_is_said_first_and_the_data_before_the_model(options, run_here, capsys):
    assert run_here(options) == 0
    starts = [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()]
    assert starts[0] == "training"
    assert starts.index("training") < starts.index("images") < starts.index("model")


@pytest.mark.parametrize(("rank", "is_loud"), [("0", True), ("1", False)])
def test_only_the_main_process_speaks(rank, is_loud, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(announce, "DELAY", 0.02)
    monkeypatch.setattr(announce, "REPEAT", 0.05)
    output = io.StringIO()
    with redirect_stderr(output), announce.announced("waiting"):
        time.sleep(0.3)
    lines = output.getvalue().splitlines()
    assert bool(lines) == is_loud
    if is_loud:
        assert lines[0] == "waiting ..."
        assert re.fullmatch(r"waiting: \d+ s so far", lines[1])
        assert re.fullmatch(r"waiting: took 0\.\d s", lines[-1])


def test_what_is_fast_is_not_announced(capfd):
    with announce.announced("thinking"):
        pass
    assert capfd.readouterr().err == ""


def test_an_error_passes(capfd):
    with pytest.raises(ValueError, match="wrong"), announce.announced("thinking"):
        raise ValueError("wrong")
