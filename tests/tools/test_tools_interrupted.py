"""Stopped commands leave nothing behind, and the next run removes the files of a killed one."""

import os
import signal
import subprocess
import sys

import pytest
from helpers.project import BASE, PROJECT
from helpers.tool_cases import run

ENDED = subprocess.Popen([sys.executable, "-c", ""])  # its process id is free afterwards
ENDED.wait()


@pytest.fixture
def handler():
    """Install a SIGTERM handler that fails; without it a failed test would end all tests."""

    def failing(*_):
        raise AssertionError("SIGTERM was not caught")

    before = signal.signal(signal.SIGTERM, failing)
    interrupt = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore it
    yield failing
    signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGINT, interrupt)


def commands(good, out):
    return {
        "resize": ["resize", good, out, "--rank", 2],
        "convert": ["convert", good, out, "--format", "peft", "--model", BASE],
        "merge": ["merge", BASE, out, "--lora", good],
    }


WHEN = [("resize", "adapter_files.files.to_bytes"), ("convert", "adapter_files.safetensors_stream.tensor_bytes"),
        ("merge", "adapter_files.safetensors_stream.tensor_bytes"), ("merge", "shutil.copyfile")]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", WHEN, ids="-".join)
def test_a_signal_leaves_nothing_behind(when, number, lora_file, handler, tmp_path, monkeypatch):
    (name, place), before = when, sorted(tmp_path.iterdir())
    monkeypatch.setattr(place, lambda *_: signal.raise_signal(number))
    out = tmp_path / ("out.safetensors" if name == "resize" else "out")
    assert run(*commands(lora_file, out)[name]) == 128 + number
    assert sorted(tmp_path.iterdir()) == before
    assert signal.getsignal(signal.SIGTERM) is handler


def test_only_the_files_of_a_killed_run_are_removed(lora_file, tmp_path):
    out = tmp_path / "out.safetensors"
    stale = [tmp_path / f".out.safetensors.{pid}.spool" for pid in (ENDED.pid, os.getpid())]
    others = [
        tmp_path / name
        for name in (".out.safetensors.1.spool", f".other.{ENDED.pid}.spool", ".out.partial")
    ]
    for folder in (*stale, *others):
        folder.mkdir()
        (folder / "0.safetensors").write_bytes(b"x")
    assert run(*commands(lora_file, out)["resize"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in (lora_file, out, *others)
    }


STOPPED = """
import sys
sys.path.insert(0, {project!r})
import train_lora
class Stop:
    def find_spec(self, name, *_):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
sys.exit(train_lora.main(["inspect", {path!r}]))
"""


def test_ctrl_c_while_torch_loads_is_no_traceback(lora_file):
    code = STOPPED.format(project=str(PROJECT), path=str(lora_file))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "error: interrupted; nothing was written\n")
