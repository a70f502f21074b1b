"""Runs of the script with several processes, and comparisons of their results."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from helpers.device_reads import DeviceReads, device_reads
from helpers.project import BASE, PROJECT, RANKS, TWEMOJI


def counted_run(run_here, options: list[str]) -> DeviceReads:
    """Runs the script; each read is labeled with the step, from 1, that it happened in or loaded a batch for."""
    with device_reads() as counter, labeled_steps(counter):
        assert run_here(options) == 0
    return counter


@contextmanager
def labeled_steps(counter: Any) -> Iterator[None]:
    """Sets the counter's label to the number of the step that a run in this block takes."""
    from training.batch_stream import BatchStream

    original = BatchStream.from_step

    def batches(stream: BatchStream, step: int, per_step: int):
        accumulation = per_step // stream.process.count
        # before the first batch comes validation, and a seed that the loader draws
        for number, batch in enumerate(original(stream, step, per_step)):
            counter.label = step + number // accumulation + 1
            yield batch
            counter.label = step + (number + 1) // accumulation + 1

    with mock.patch.object(BatchStream, "from_step", batches):
        yield


def result_of(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each step of a run, and its adapter."""
    losses = json.loads((folder / "loss.json").read_text())["loss_per_step"]
    return losses, load_file(folder / "lora.safetensors")


def assert_same_result(first: Path, second: Path) -> None:
    """Two runs have the same losses and the same adapter, bit for bit."""
    (losses, adapter), (other_losses, other_adapter) = result_of(first), result_of(second)
    assert other_losses == losses
    assert other_adapter.keys() == adapter.keys()
    assert all(torch.equal(other_adapter[key], adapter[key]) for key in adapter)


CONFIGS = PROJECT / "accelerate_configs"


def launched(
    config: str, processes: int, *arguments: str, **environment: str
) -> subprocess.CompletedProcess:
    """Runs tests/ranks.py under one of the shipped configs, on CPUs."""
    command = [
        str(Path(sys.executable).parent / "accelerate"), "launch", f"--config_file={CONFIGS / config}.yaml",
        f"--num_processes={processes}", str(RANKS), *arguments,
    ]  # fmt: skip
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", **environment}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=400, check=False, env=env
    )


def common(cache_dir: Path) -> list[str]:
    return [
        f"--model.path={BASE}", f"--data.path={TWEMOJI / 'train'}", f"--data.cache_dir={cache_dir}",
        "--data.resolution=64", "--batch_size=1", "--rank=4",
        "--training_dtype=fp32", "--lora_dtype=fp32", "--no_gradient_checkpointing", "--no_preview",
        "--adapter.targets=attention", "--tracking.log_every=3", "--steps=3", "--tracking.log_samples",
        "--optim.eps=1e-5",  # with 1e-8 Adam makes a whole step of gradients that are nothing but rounding
    ]  # fmt: skip


def assert_same_run(one: Path, many: Path, tolerance: float = 1e-5) -> None:
    assert samples(one) == samples(many) != []
    a, b = (json.loads((folder / "loss.json").read_text()) for folder in (one, many))
    for what in ("loss_per_micro_step", "loss_per_step", "gradient_norm_per_step"):
        assert b[what] == pytest.approx(a[what], rel=1e-5), what
    assert [entry["loss"] for entry in b["validation"]] == pytest.approx(
        [e["loss"] for e in a["validation"]], 1e-5
    )
    x, y = (load_file(folder / "lora.safetensors") for folder in (one, many))
    assert x.keys() == y.keys()
    whole, other = (torch.cat([t[key].flatten() for key in sorted(t)]) for t in (x, y))
    assert (whole - other).norm() <= tolerance * whole.norm()


def runs_file(folder: Path, *runs: list[str]) -> str:
    (folder / "runs.json").write_text(json.dumps(runs))
    return str(folder / "runs.json")


def assert_same_adapter(one: Path, two: Path) -> None:
    a, b = load_file(one / "lora.safetensors"), load_file(two / "lora.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def adapter(folder: Path) -> dict:
    return load_file(folder / "lora.safetensors")


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not a[name].equal(b[name])]
    assert not different


def samples(folder: Path) -> list[dict]:
    rows = [
        json.loads(line)
        for path in folder.glob("sample_log/*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return sorted(rows, key=lambda row: row["visit"])
