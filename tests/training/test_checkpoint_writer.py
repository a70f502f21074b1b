"""Checkpoints are written beside the training, which neither waits for the disk nor loses an error."""

import threading

import pytest

from training.checkpoints import storage
from training.checkpoints.storage import CheckpointError
from training.checkpoints.writer import CheckpointWriter
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
