"""status.json and `status`: what a run is doing, and whether it lives."""

import json
import time
from pathlib import Path

import pytest
from helpers.run_folders import status_of_this_process, write_status

import train_lora
from training import build
from training.distributed.engine import Engine
from training.reporting import status as status_module
from training.reporting.json_lines import JsonLines
from training.reporting.liveness import SILENT_AFTER, STALLED_AFTER, condition_of
from training.reporting.status import StatusFile, read_status
from training.sampling.renderer import SamplingError

HOUR = 3600.0


def kinds(folder: Path) -> list[str]:
    """The kinds of the events of a run, without messages."""
    events = JsonLines(folder / "events.jsonl").rows()
    return [event["kind"] for event in events if event["kind"] != "message"]


# Times are relative to the moment of the test: the parameters are made long before, at collection.
@pytest.mark.parametrize(
    ("changes", "condition"),
    [
        ({}, "running"),
        # a process that resumes may compile for long
        ({"progress_at": -STALLED_AFTER - 1, "has_stepped": False}, "running"),
        ({"state": "finished"}, "finished"),
        ({"state": "failed", "pid": 1}, "failed"),
        ({"pid": 2**22 + 1}, "dead"),
        # another process has the number now
        (
            {
                "pid_started_at": -9 * HOUR,
                "updated_at": -SILENT_AFTER - 1,
            },
            "dead",
        ),
        # somebody has set the clock
        ({"pid_started_at": -9 * HOUR}, "running"),
        ({"host": "elsewhere"}, "running"),
        ({"host": "elsewhere", "updated_at": -SILENT_AFTER - 1}, "dead"),
        ({"updated_at": -SILENT_AFTER - 1}, "stalled"),
        ({"progress_at": -STALLED_AFTER - 1}, "stalled"),
        # a step takes ten minutes
        ({"progress_at": -HOUR, "steps_per_second": 1 / 600}, "running"),
        # encoding has no steps
        ({"progress_at": -HOUR, "phase": "encode images"}, "running"),
    ],
)
def test_the_condition_of_a_run(changes, condition):
    now = time.time()
    times = {name: now + value for name, value in changes.items() if name.endswith("_at")}
    assert condition_of(status_of_this_process(**{**changes, **times}), now) == condition


def test_the_time_that_is_left():
    assert status_of_this_process().remaining_seconds == 30
    assert status_of_this_process(steps_per_second=0.0).remaining_seconds is None
    assert status_of_this_process(state="finished").remaining_seconds is None


def test_a_run_writes_its_status_and_events(options, run_here, tmp_path):
    assert run_here([*options, "--data.validation_fraction=0.3"]) == 0
    folder = tmp_path / "out"
    status = read_status(folder)
    assert (status.state, status.step, status.steps) == ("finished", 6, 6)
    assert status.loss > 0
    assert status.steps_per_second > 0
    assert kinds(folder) == ["started", "finished"]
    events = JsonLines(folder / "events.jsonl").rows()
    messages = {event["step"]: event["text"] for event in events if event["kind"] == "message"}
    assert messages[6].startswith("validation loss at step 6")


def test_an_error_is_in_the_status(options, run_here, tmp_path, monkeypatch, capsys):
    """Also in that of a run that is resumed; its marks tell of the failure."""

    def fail(*_):
        raise RuntimeError("the disk burns")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "backward", fail)
        assert run_here(options) == 1
    status = read_status(tmp_path / "out")
    assert (status.state, status.message) == ("failed", "RuntimeError: the disk burns")
    assert train_lora.main(["status", str(tmp_path / "out")]) == 1
    assert "RuntimeError: the disk burns" in capsys.readouterr().out
    assert run_here(options) == 0
    assert kinds(tmp_path / "out") == ["started", "failed", "resumed", "finished"]


def test_a_mistake_leaves_no_status(options, run_here, tmp_path):
    assert run_here([*options, "--adapter.targets=nothing"]) == 2
    assert not (tmp_path / "out").exists()


def fail_to_load(*_):
    raise RuntimeError("no such disk")


def test_a_killed_run_is_marked(options, run_here, tmp_path, monkeypatch):
    """The file ends without an end, in the middle of a line, as after a SIGKILL."""
    assert run_here([*options, "--checkpoint.every=2"]) == 0
    path = tmp_path / "out" / "events.jsonl"
    *lines, finished = path.read_text().splitlines(keepends=True)
    assert "finished" in finished
    path.write_text("".join(lines) + finished[:20])
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    killed_at = status["updated_at"] - 5
    text = json.dumps({**status, "state": "running", "step": 5, "trained_until": killed_at})
    (tmp_path / "out" / "status.json").write_text(text)
    with monkeypatch.context() as patch:  # a start that dies while it loads
        patch.setattr(build, "load_denoiser", fail_to_load)
        assert run_here([*options, "--steps=8"]) == 1
    assert run_here([*options, "--steps=8"]) == 0
    assert kinds(tmp_path / "out") == ["started", "killed", "resumed", "finished"]
    events = {event["kind"]: event for event in JsonLines(path).rows()}
    assert events["killed"]["step"] == 6, "the last metrics are of step 6"
    assert events["killed"]["time"] == killed_at
    assert events["resumed"]["step"] == 6


def test_a_mistake_leaves_the_status_of_a_finished_run(options, run_here, tmp_path):
    assert run_here(options) == 0
    before = (tmp_path / "out" / "status.json").read_text()
    assert run_here([*options, "--steps=4"]) == 2
    assert json.loads((tmp_path / "out" / "status.json").read_text()) == json.loads(before)
    assert kinds(tmp_path / "out") == ["started", "finished"]


def test_a_new_run_has_no_numbers_of_an_earlier_one(options, run_here, tmp_path, monkeypatch):
    assert run_here(options) == 0

    def fail(*_):
        raise RuntimeError("not yet")

    monkeypatch.setattr(Engine, "backward", fail)
    assert run_here([*options, "--rank=2", "--overwrite"]) == 1
    status = read_status(tmp_path / "out")
    assert (status.loss, status.steps_per_second, status.remaining_seconds) == (None, 0, None)


def test_a_mistake_on_another_process_leaves_the_status_too(tmp_path):
    write_status(tmp_path, state="finished")
    before = (tmp_path / "status.json").read_text()
    status_file = StatusFile(tmp_path, 3, 2, is_main=True)
    with status_file.kept():
        status_file.end_by_other(2, "rank 1: ConfigError: wrong")
    assert json.loads((tmp_path / "status.json").read_text()) == json.loads(before)
    status_file = StatusFile(tmp_path, 3, 2, is_main=True)
    with status_file.kept():
        status_file.end_by_other(143, "rank 1: RunStopped: SIGTERM: saved step 2")
        status_file.set_step(3, 1.0)
    assert read_status(tmp_path).state == "stopped"


def test_a_finished_run_that_is_started_again_keeps_its_numbers(options, run_here, tmp_path):
    assert run_here(options) == 0
    first = read_status(tmp_path / "out")
    assert run_here(options) == 0
    second = read_status(tmp_path / "out")
    assert (second.loss, second.steps_per_second) == (first.loss, first.steps_per_second)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (SamplingError("no image"), "finished"),
        (RuntimeError("no"), "failed"),
        (KeyError(), "failed"),
    ],
)
def test_the_state_after_an_error(error, state, tmp_path):
    status_file = StatusFile(tmp_path, 3, 1, is_main=True)
    with pytest.raises(type(error)), status_file.kept():
        raise error
    assert read_status(tmp_path).state == state


def test_a_phase_is_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(status_module, "MIN_INTERVAL", 0.01)
    status_file = StatusFile(tmp_path, 3, 1, is_main=True)
    with status_file.kept():
        status_file.set_phase("samples")
        deadline = time.monotonic() + 5
        while read_status(tmp_path).phase != "samples":
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_the_phase_says_how_much_is_encoded(images, options, run_here, monkeypatch):
    phases = []
    original = StatusFile.set_encoded

    def recorded(self, noun, done, total):
        original(self, noun, done, total)
        phases.append(self.status.phase)

    monkeypatch.setattr(StatusFile, "set_encoded", recorded)
    own_cache = f"--data.cache_dir={images.parent / 'own_cache'}"
    assert run_here([*options, own_cache]) == 0
    assert phases == [
        f"encode {noun} {done}/4" for noun in ("captions", "images") for done in range(4)
    ]


def test_the_status_is_written_while_the_main_thread_works(tmp_path, monkeypatch):
    monkeypatch.setattr(status_module, "BEAT_EVERY", 0.05)
    monkeypatch.setattr(status_module, "MIN_INTERVAL", 0.01)
    status_file = StatusFile(tmp_path, steps=3, num_processes=1, is_main=True)
    with status_file.kept():
        first = read_status(tmp_path)
        deadline = time.monotonic() + 20
        while read_status(tmp_path).updated_at == first.updated_at:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert read_status(tmp_path).state == "running"
    assert read_status(tmp_path).state == "finished"


def test_other_processes_write_no_status(tmp_path):
    with StatusFile(tmp_path, steps=3, num_processes=2, is_main=False).kept():
        pass
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_ends_no_run(tmp_path):
    """The folder cannot be made, because a file has its name."""
    (tmp_path / "file").write_text("")
    status_file = StatusFile(tmp_path / "file" / "out", 3, 1, is_main=True)
    with status_file.kept():
        status_file.set_step(1, 2.0)
    assert status_file.status.state == "finished"


def test_the_table(tmp_path, capsys):
    write_status(tmp_path / "a")
    write_status(tmp_path / "b", pid=2**22 + 1, phase="samples")
    write_status(tmp_path / "c", state="stopped", message="SIGTERM: saved step 40 of 100")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "status.json").write_text("{}")
    assert train_lora.main(["status", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    header, alive, dead, dead_note, stopped, stopped_note, damaged, damaged_note = out.splitlines()
    assert header.split() == [
        "run",
        "state",
        "phase",
        "step",
        "steps/s",
        "left",
        "loss",
        "GPU",
        "GiB",
        "seen",
    ]
    assert alive.split()[1:8] == ["running", "train", "40/100", "2", "30s", "0.2500", "7.5"]
    assert dead.split()[1] == "dead"
    assert "has ended without a word in the phase `samples`" in dead_note
    assert stopped.split()[1] == "stopped"
    assert stopped_note.strip() == "SIGTERM: saved step 40 of 100"
    assert damaged.split()[1] == "unreadable"
    assert "cannot be read" in damaged_note


def test_the_exit_code_and_json(tmp_path, capsys):
    write_status(tmp_path / "a")
    assert train_lora.main(["status", "--json", str(tmp_path / "a")]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["condition"], entry["step"]) == ("running", 40)


@pytest.mark.parametrize("command", ["status", "report"])
def test_mistakes_with_folders(command, tmp_path, capsys):
    assert train_lora.main([command, str(tmp_path), str(tmp_path / "missing")]) == 2
    error = capsys.readouterr().err
    assert f"OUTPUT_DIR {tmp_path}: holds no " in error
    assert "missing: is not a folder. Check the path" in error
    assert train_lora.main([command]) == 2
    assert "no folder given" in capsys.readouterr().err
