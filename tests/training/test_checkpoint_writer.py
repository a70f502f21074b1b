"""Checkpoints are written beside the training, which neither waits for the disk nor loses an error."""

import threading
import time

import pytest

from training.checkpoints import storage
from training.checkpoints.storage import CheckpointError
from training.checkpoints.writer import CheckpointWriter
from training.loss import LossFunction
from training.reporting.history import TrainingDiverged
from training.reporting.reporter import Reporter

FILES = {"state.json": b"{}"}


def test_training_goes_on_while_a_checkpoint_is_written(options, run_here, tmp_path, monkeypatch):
    save, advance = storage.save, Reporter.advance
    steps_done, third_step = [], threading.Event()

    def slow_save(folder, step, files, keep):
        assert third_step.wait(60) or step > 2
        save(folder, step, files, keep)

    def counted_advance(reporter):
        advance(reporter)
        steps_done.append(1)
        if len(steps_done) == 3:
            third_step.set()

    monkeypatch.setattr(storage, "save", slow_save)
    monkeypatch.setattr(Reporter, "advance", counted_advance)
    assert run_here([*options, "--checkpoint.every=2", "--checkpoint.keep=5"]) == 0
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000004", "step_00000006"]


def test_a_failed_checkpoint_ends_the_run_at_a_later_step(options, run_here, monkeypatch, capsys):
    advance = Reporter.advance
    steps_done, failed = [], threading.Event()

    def failing_save(folder, step, files, keep):
        try:
            raise CheckpointError("the disk is full")
        finally:
            failed.set()

    def counted_advance(reporter):
        advance(reporter)
        steps_done.append(1)
        if len(steps_done) == 4:
            assert failed.wait(60)

    monkeypatch.setattr(storage, "save", failing_save)
    monkeypatch.setattr(Reporter, "advance", counted_advance)
    assert run_here([*options, "--checkpoint.every=3"]) == 1
    assert "error: the disk is full" in capsys.readouterr().err
    assert 3 <= len(steps_done) <= 5


def test_checkpoints_are_written_one_after_the_other(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in (1, 2, 3):
        writer.start(step, FILES)
    writer.wait()
    assert [path.name for path in storage.checkpoint_paths(tmp_path)] == [
        "step_00000002",
        "step_00000003",
    ]


def test_a_failure_is_raised_once(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    writer = CheckpointWriter(tmp_path / "file", keep=2)
    writer.start(1, FILES)
    with pytest.raises(CheckpointError, match="could not be written"):
        writer.wait()
    writer.check()
    writer.wait()


def test_another_error_is_reported_too_and_names_the_newest_checkpoint(
    options, run_here, tmp_path, monkeypatch, capsys
):
    """A step fails while a checkpoint is written, which then removes the one before it."""
    save, loss = storage.save, LossFunction.__call__
    calls = []

    def slow_save(folder, step, files, keep):
        time.sleep(1)
        save(folder, step, files, keep)

    def failing_loss(*args):
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) > 4 else 1)

    monkeypatch.setattr(storage, "save", slow_save)
    monkeypatch.setattr(LossFunction, "__call__", failing_loss)
    more = ["--checkpoint.every=2", "--checkpoint.keep=1", "--tracking.log_every=1"]
    assert run_here([*options, *more]) == 1
    error = capsys.readouterr().err
    assert "step 5 is not finite" in error
    (path,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert f"last good checkpoint: {path}" in error
    assert path.name == "step_00000004"


def test_a_failed_checkpoint_does_not_hide_another_error(options, run_here, monkeypatch, capsys):
    def failing_save(folder, step, files, keep):
        time.sleep(1)
        raise CheckpointError("the disk is full")

    def failing_loss(*args):
        raise TrainingDiverged("the loss is not finite")

    loss = LossFunction.__call__
    calls = []

    def loss_until_step_3(*args):
        calls.append(1)
        return loss(*args) if len(calls) < 3 else failing_loss()

    monkeypatch.setattr(storage, "save", failing_save)
    monkeypatch.setattr(LossFunction, "__call__", loss_until_step_3)
    assert run_here([*options, "--checkpoint.every=2"]) == 1
    captured = capsys.readouterr()
    assert "error: the loss is not finite" in captured.err
    assert "note: the disk is full" in captured.out
