"""Signals, wishes and kills: at any moment, and nothing is lost but the current step."""

import fcntl
import json
import signal
import time

import pytest
import torch
from helpers.project import TWEMOJI
from safetensors.torch import load_file

from training.stopping.signals import RunStopped, SignalHandler, request_of

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture
def long(options) -> list[str]:
    """Twelve steps with validation and previews, in a cache of their own."""
    return [*options, "--steps=12", "--preview", "--sample.num_inference_steps=2", "--validation.every=4",
            f"--data.validation_path={TWEMOJI / 'validation'}", "--tracking.log_every=5"]  # fmt: skip


def same(one, two) -> None:
    a, b = load_file(one / "lora.safetensors"), load_file(two / "lora.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    x, y = (json.loads((folder / "loss.json").read_text()) for folder in (one, two))
    assert x == y
    assert (one / "preview.png").read_bytes() == (two / "preview.png").read_bytes()


def once(patch, place: str, number: int, when: int = 1) -> list[int]:
    """Raises the signal in the `when`-th call of the function at `place`."""
    module, _, name = place.rpartition(".")
    import importlib

    try:
        holder = importlib.import_module(module)
    except ModuleNotFoundError:
        module, _, cls = module.rpartition(".")
        holder = getattr(importlib.import_module(module), cls)
    original, calls = getattr(holder, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == when:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    patch.setattr(holder, name, call)
    return calls


MOMENTS = {  # where, in which call, the step that is saved
    "encoding captions": ("data.precompute.build.encode_captions", 1, None),
    "encoding images": ("data.precompute.encode.encode_media", 1, None),
    "loading the model": ("training.build.attach_adapters", 1, None),
    "the first validation": ("training.validation.chunk_batch", 3, 0),
    "a training step": ("training.loss.LossFunction.__call__", 30, None),
    "a validation": ("training.validation.chunk_batch", 7, 4),
    "a checkpoint": ("training.checkpoints.storage.save", 1, 12),
    "a preview": ("training.sampling.renderer.draw_sample", 3, 12),
    "the export": ("training.export.write_adapter", 1, 12),
}


QUICK_MOMENTS = ("encoding images", "a training step", "a checkpoint", "a preview")
CASES = [(moment, signal.SIGTERM) for moment in QUICK_MOMENTS]
CASES += [
    pytest.param(moment, signal.SIGTERM, marks=pytest.mark.long)
    for moment in MOMENTS
    if moment not in QUICK_MOMENTS
]
CASES += [
    pytest.param(moment, signal.SIGINT, marks=pytest.mark.long)
    for moment in ("encoding images", "a training step", "the export")
]


@pytest.mark.parametrize(("moment", "number"), CASES)
def test_a_signal_at_any_moment_costs_nothing(moment, number, long, run_here, tmp_path, capsys):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    place, when, step = MOMENTS[moment]
    cache = [f"--data.cache_dir={tmp_path / 'cache'}"]
    with pytest.MonkeyPatch.context() as patch:
        calls = once(patch, place, number, when)
        assert run_here([*long, *cache, f"--output_dir={stopped}"]) == STATUS[number]
        assert len(calls) >= when
    out = capsys.readouterr().out
    assert f"stopped by {signal.Signals(number).name}: " in out
    if step is not None:
        assert (stopped / "checkpoints" / f"step_{step:08d}").is_dir(), out
    is_exported = moment == "a preview"  # which is drawn after the export
    assert (stopped / "lora.safetensors").exists() == is_exported
    assert run_here([*long, *cache, f"--output_dir={stopped}"]) == 0
    assert run_here([*long, *cache, f"--output_dir={straight}"]) == 0
    same(straight, stopped)
    steps = [
        json.loads(line)["step"] for line in (stopped / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps))
    assert steps[0] == 0
    assert steps[-1] == 12


def test_sigusr1_outside_slurm_saves_and_goes_on(options, run_here, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    once(monkeypatch, "training.loss.LossFunction.__call__", signal.SIGUSR1, 3)
    assert run_here([*options, "--checkpoint.every=0"]) == 0
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000006"]
    assert "stopped" not in capsys.readouterr().out


def test_sigusr1_under_slurm_saves_and_requeues(options, run_here, tmp_path, monkeypatch, capsys):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=":")
    once(monkeypatch, "training.loss.LossFunction.__call__", signal.SIGUSR1, 3)
    assert run_here(options) == 0
    assert "SIGUSR1: saved step 3 of 6; job 77 is requeued" in capsys.readouterr().out
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert not (tmp_path / "out" / "lora.safetensors").exists()
    assert run_here(options) == 0


def test_a_file_asks_for_a_checkpoint(options, run_here, tmp_path, monkeypatch):
    from training.callbacks import HandleRequests

    original = HandleRequests.after_step

    def answer(self):
        if self.trainer.state.step == 2:
            (self.trainer.services.folder / "save").touch()
            self.trainer.services.requests.polled_at = -1e9  # as if a second had gone by
        original(self)

    monkeypatch.setattr(HandleRequests, "after_step", answer)
    assert run_here([*options, "--checkpoint.every=0"]) == 0
    assert (tmp_path / "out" / "checkpoints" / "step_00000002").is_dir()
    assert not (tmp_path / "out" / "save").exists()


def test_the_clock_asks_for_checkpoints(options, run_here, tmp_path):
    more = ["--checkpoint.every=0", "--checkpoint.every_minutes=1e-9", "--checkpoint.keep=9"]
    assert run_here([*options, *more]) == 0
    assert len([*(tmp_path / "out" / "checkpoints").iterdir()]) == 7


def test_a_launcher_may_repeat_a_signal_but_a_second_ctrl_c_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr("os._exit", left.append)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    signals = SignalHandler()
    with signals.installed(), signals.deferred():
        for _ in range(4):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGUSR1)
        assert not left
        assert signals.request == request_of(signal.SIGINT)
        signals.interrupted_at = time.monotonic() - 3
        signal.raise_signal(signal.SIGINT)
    assert left == [130]


def test_two_runs_do_not_share_an_output_dir(options, run_here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.run.LOCK_TIMEOUT", 0.3)
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_here(options) == 2
        assert "is in use by another run" in capsys.readouterr().err
    assert run_here(options) == 0


def test_a_step_that_is_not_finite_is_skipped(options, run_here, tmp_path, monkeypatch, capsys):
    from training.loss import LossFunction

    original, calls = LossFunction.__call__, []

    def broken(self, denoiser, batch):
        calls.append(batch)
        return original(self, denoiser, batch) * (float("nan") if len(calls) in (2, 5) else 1)

    for optimizer in ("AdamW", "Adam", "SGD", "RMSprop"):
        calls.clear()
        folder = tmp_path / optimizer
        skip = [
            *options,
            f"--output_dir={folder}",
            f"--optimizer={optimizer}",
            "--optim.on_non_finite=skip",
        ]
        monkeypatch.setattr(LossFunction, "__call__", broken)
        assert run_here(skip) == 0
        out = capsys.readouterr().out
        assert "skipped: step 2 is not finite" in out
        assert "its samples: " in out
        losses = json.loads((folder / "loss.json").read_text())
        assert losses["skipped_steps"] == [2, 5]
        assert [step for step, loss in enumerate(losses["loss_per_step"], 1) if loss is None] == [
            2,
            5,
        ]
        assert all(
            tensor.isfinite().all() for tensor in load_file(folder / "lora.safetensors").values()
        )
        calls.clear()
        assert run_here([*skip, "--overwrite", "--optim.max_skipped_steps=2"]) == 1
        error = capsys.readouterr().err
        assert "step 5 is not finite" in error
        assert "2 steps were skipped, the limit of --optim.max_skipped_steps" in error


def test_a_killed_run_is_one_run_of_the_tracker(options, run_here, tmp_path, monkeypatch):
    """Rows that were sent before the kill are not sent again."""
    from helpers.rank_faults import Abandoned
    from helpers.wandb_log import records

    from training.callbacks import HandleRequests

    original = HandleRequests.after_step

    def answer(self):
        if self.trainer.state.step == 5:
            raise Abandoned
        original(self)

    run = [*options, "--tracking.report_to=wandb", "--tracking.log_every=1", "--checkpoint.every=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HandleRequests, "after_step", answer)
        with pytest.raises(Abandoned):
            run_here(run)
    import wandb

    wandb.finish()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]
    assert run_here(run) == 0
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
    ids, steps = [], []
    for log in sorted((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")):
        read = list(records(log))
        ids += [record.run.run_id for record in read if record.HasField("run")]
        steps += [record.history.step.num for record in read if record.HasField("history")]
    assert len(set(ids)) == 1
    assert steps == sorted(set(steps))
    assert {1, 2, 3, 4, 5, 6} <= {*steps}


def rows_of(folder) -> list[dict]:
    return [
        json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_signal_during_imports_is_answered_after_them():
    signals = SignalHandler()
    finished = []

    def imports() -> None:
        with signals.held():
            signal.raise_signal(signal.SIGTERM)
            finished.append(True)

    with signals.installed(), pytest.raises(RunStopped, match="stopped before the first step"):
        imports()
    assert finished
