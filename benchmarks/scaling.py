"""Speed-up by a second process, and where the time of a step goes: `python
benchmarks/scaling.py`.

Runs of train_lora.py take turns; each of their processes has one thread. There are three setups:
one process alone; two separate runs of one process each, at the same time; and one run of two
processes, over gloo. The bar is on the samples per second of two processes relative to one. It
counts only the half of the rounds in which other programs used the machine least. The ratio to
two separate runs shows the cost of the distribution itself, because two separate runs share the
machine too.

The time of a checkpoint follows, and the time from a SIGTERM to a saved run on the demo. A line
per bar is printed; the exit code is 1 if one is missed. `--tiny` only tests that everything
runs, on a tiny model; its throughput does not count. `--paper` prints the tables of
docs/scaling.md instead (benchmarks/on_paper.py).
"""

import argparse
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.bars import Bar  # noqa: E402
from benchmarks.scaling_worker import EMOJI, Worker, request_all  # noqa: E402

THROUGHPUT_BAR = 1.9
"""Samples per second of two processes over those of one."""
ALONE, SEPARATE, TOGETHER = "1 rank", "2 runs of 1 rank", "1 run of 2 ranks"
TIMES = (
    "step",
    "data",
    "forward+backward",
    "waiting",
    "reduction",
    "optimizer",
    "callbacks",
    "cpu",
)
WIDTHS = {name: max(len(name) + 2, 9) for name in TIMES}
WARM_UP_STEPS = 3
ELEMENT_BYTES = {"Float": 4, "Long": 8}
"""Sizes of the element types in torch's flight recorder."""


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    name: str
    batch_size: int
    dtype: str
    unet: str = ""
    """Name of a UNet config in benchmarks/unet.py, which gets random weights. Empty: the embedded
    model."""


CASES = (
    Case("UNet of SD 1.5's size, bf16, batch 1", 1, "bf16", "CONFIG"),
    Case("embedded UNet, fp32, batch 8", 8, "fp32"),
)
TINY_CASES = (Case("tiny UNet, bf16, batch 1", 1, "bf16", "TINY"),)


def make_model(folder: Path, config_name: str) -> Path:
    """Write the embedded model with another UNet of random weights.

    Its cross-attention is narrower than in the config, to fit the embedded text encoder."""
    import torch

    from benchmarks import unet

    config_file = EMOJI / "base" / "text_encoder" / "config.json"
    width = json.loads(config_file.read_text(encoding="utf-8"))["hidden_size"]
    shutil.copytree(EMOJI / "base", folder, ignore=shutil.ignore_patterns("unet"))
    model = unet.base_unet({**getattr(unet, config_name), "cross_attention_dim": width})
    # not model.to: diffusers' version warns of layers that the model does not have
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder / "unet")  # type: ignore[operator]
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def busy_seconds() -> float:
    """Return the seconds that all cores together have worked since the machine started."""
    words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    idle, io_wait = int(words[3]), int(words[4])
    ticks = sum(map(int, words[:8])) - idle - io_wait
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass
class Results:
    """Figures of a case, in the order of its rounds."""

    steps: dict[str, list[dict]] = field(default_factory=dict)
    """For each setup the times of the steps of its first process."""
    rates: dict[str, list[float]] = field(default_factory=dict)
    """For each setup the samples per second of each round."""
    collectives: list[list] = field(default_factory=list)
    adapter_bytes: int = 0
    checkpoints: list[dict] = field(default_factory=list)
    foreign_load: list[float] = field(default_factory=list)
    """Number of cores that other programs kept busy in each round."""

    def add(self, setup: str, answers: list[dict], batch_size: int) -> None:
        """Add the answers of the workers of one setup in one round."""
        seconds = []
        for answer in answers:
            step_seconds = [record["step"] for record in answer["steps"]]
            seconds.append(sum(step_seconds) / len(step_seconds))
        if setup == TOGETHER:
            # the samples of a step are done when the slower process is
            rate = batch_size * len(seconds) / max(seconds)
            self.collectives += answers[0]["collectives"]
            self.adapter_bytes = answers[0]["adapter_bytes"]
        else:
            rate = sum(batch_size / value for value in seconds)
        self.rates.setdefault(setup, []).append(rate)
        steps = self.steps.setdefault(setup, [])
        for records in zip(*(answer["steps"] for answer in answers), strict=True):
            steps.append(with_waiting(records))

    def quiet_rounds(self) -> list[int]:
        """Return the half of the rounds in which other programs did least, because two processes
        need both cores."""
        by_load = sorted(range(len(self.foreign_load)), key=self.foreign_load.__getitem__)
        return by_load[: (len(by_load) + 1) // 2]

    def ratio(self, setup: str, rounds: Iterable[int]) -> float:
        """Return the median speed of two processes relative to another setup."""
        return median(self.rates[TOGETHER][i] / self.rates[setup][i] for i in rounds)

    def cpu_seconds(self, setup: str) -> float:
        """Return the median CPU time of a step."""
        return median(step["cpu"] for step in self.steps[setup])


def with_waiting(records: tuple[dict, ...]) -> dict[str, Any]:
    """Return the first process's times of a step, its reductions without the time that it waited
    for the slower process."""
    first = dict(records[0])
    waiting = 0.0
    for reductions in zip(*(record["reductions"] for record in records), strict=True):
        first_begin = reductions[0][0]
        waiting += max(begin for begin, _ in reductions) - first_begin
    first["waiting"] = waiting
    first["reduction"] -= waiting
    return first


def measure(case: Case, folder: Path, rounds: int, num_steps: int) -> Results:
    """Let each setup take `num_steps` steps in each of the rounds, then write checkpoints."""
    model = make_model(folder / "model", case.unet) if case.unet else EMOJI / "base"
    options = [
        f"--model.path={model}",
        f"--batch_size={case.batch_size}",
        f"--training_dtype={case.dtype}",
    ]
    single = [Worker(folder / f"single_{index}", options) for index in range(2)]
    port = free_port()
    pair = [Worker(folder / "pair", options, (rank, 2, port)) for rank in range(2)]
    setups = {ALONE: single[:1], SEPARATE: single, TOGETHER: pair}
    names = list(setups)
    results = Results()
    try:
        for workers in (single, pair):
            request_all(workers, WARM_UP_STEPS)
            request_all(workers, "save")  # waits until the base model is hashed
        for number in range(rounds):
            foreign = seconds = 0.0
            shift = number % len(names)
            for setup in names[shift:] + names[:shift]:
                # not timed: a process that waited for its turn has lost its caches
                request_all(setups[setup], 1)
                busy_before, begin = busy_seconds(), time.monotonic()
                answers = request_all(setups[setup], num_steps)
                seconds += time.monotonic() - begin
                own_seconds = sum(record["cpu"] for answer in answers for record in answer["steps"])
                foreign += busy_seconds() - busy_before - own_seconds
                results.add(setup, answers, case.batch_size)
            results.foreign_load.append(max(foreign, 0.0) / seconds)
        for _ in range(rounds):
            request_all(pair, 1)
            results.checkpoints.append(request_all(pair, "save")[0])
    finally:
        for worker in (*single, *pair):
            worker.end()
    return results


def show(case: Case, results: Results) -> list[Bar]:
    """Print the figures of a case; return its bars."""
    num_steps = len(results.steps[ALONE])
    num_rounds = len(results.rates[ALONE])
    print(f"\n{case.name}: {num_rounds} rounds, medians of {num_steps} steps of rank 0")
    header = "".join(f"{name:>{WIDTHS[name]}}" for name in TIMES)
    print(f"{'ms':18}{header}{'samples/s':>11}")
    for setup, steps in results.steps.items():
        cells = ""
        for name in TIMES:
            milliseconds = 1000 * median(step[name] for step in steps)
            cells += f"{milliseconds:{WIDTHS[name]}.1f}"
        print(f"{setup:18}{cells}{median(results.rates[setup]):11.3f}")
    bars = [*show_throughput(case, results), show_collectives(case, results)]
    seconds = median(checkpoint["seconds"] for checkpoint in results.checkpoints)
    files = results.checkpoints[-1]["files"]
    sizes = ", ".join(f"{name} {size:,}" for name, size in sorted(files.items()))
    print(f"checkpoint: {seconds * 1000:.0f} ms, {sum(files.values()):,} bytes: {sizes}")
    return bars


def show_throughput(case: Case, results: Results) -> list[Bar]:
    """Print the speed of two processes relative to the other setups; return the bar."""
    all_rounds, quiet_rounds = list(range(len(results.foreign_load))), results.quiet_rounds()
    for name, rounds in (("all rounds", all_rounds), ("the quieter half", quiet_rounds)):
        loads = [results.foreign_load[i] for i in rounds]
        print(
            f"{name}, other processes at {min(loads):.2f} to {max(loads):.2f} cores: {TOGETHER} "
            f"over {ALONE} {results.ratio(ALONE, rounds):.3f}, over {SEPARATE} "
            f"{results.ratio(SEPARATE, rounds):.3f}"
        )
    cpu_ratio = results.cpu_seconds(TOGETHER) / results.cpu_seconds(ALONE)
    print(f"CPU seconds per step and rank, {TOGETHER} over {ALONE}: {cpu_ratio:.3f}")
    if not case.unet:
        return []  # the bar is for steps of a real size
    ratio = results.ratio(ALONE, quiet_rounds)
    text = f"{case.name}: {ratio:.3f} times the samples per second of 1 rank, bar {THROUGHPUT_BAR}"
    return [Bar(text, ratio >= THROUGHPUT_BAR, depends_on_time=True)]


def show_collectives(case: Case, results: Results) -> Bar:
    """Print what a process sends per step; return the bar: nothing but gradients and a request."""
    num_steps = len(results.steps[TOGETHER])
    groups: Counter[tuple] = Counter()
    types: Counter[tuple] = Counter()
    for name, group, element_types, shapes in results.collectives:
        size = num_bytes(element_types, shapes)
        groups[name, group, size] += 1
        types[name, element_types[0], size] += 1
    for (name, group, size), count in sorted(groups.items()):
        print(f"  {count / num_steps:g} per step: {name}, {size:,} bytes, group {group}")
    expected = {
        ("gloo:all_reduce", "Float", results.adapter_bytes): num_steps,
        ("gloo:all_reduce", "Long", 8): num_steps,
    }
    text = (
        f"{case.name}: per step one all-reduce of the adapters' {results.adapter_bytes:,} bytes, "
        "one of 8, no more"
    )
    return Bar(text, types == expected, depends_on_time=False)


def num_bytes(element_types: list[str], shapes: list[list[int]]) -> int:
    """Return the size of all tensors of a collective."""
    total = 0
    for element_type, shape in zip(element_types, shapes, strict=True):
        num_elements = 1
        for side in shape:
            num_elements *= side
        total += num_elements * ELEMENT_BYTES[element_type]
    return total


def main(arguments: list[str] | None = None) -> int:
    """Print the tables and a line per bar; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each setup")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, one round")
    parser.add_argument(
        "--paper", action="store_true", help="calculate bytes and seconds of large runs instead"
    )
    options = parser.parse_args(arguments)
    if options.paper:
        from benchmarks import on_paper

        return on_paper.main()
    from benchmarks import stopping

    bars = []
    with tempfile.TemporaryDirectory() as name:
        for number, case in enumerate(TINY_CASES if options.tiny else CASES):
            rounds, num_steps = (1, 2) if options.tiny else (options.rounds, options.steps)
            folder = Path(name) / str(number)
            bars += show(case, measure(case, folder, rounds, num_steps))
            shutil.rmtree(folder)
        bars.append(stopping.measure(Path(name), 1 if options.tiny else 3))
    print()
    for bar in bars:
        print(f"{bar.text}: {'ok' if bar.is_met else 'NOT OK'}")
    counted_bars = [bar for bar in bars if not (options.tiny and bar.depends_on_time)]
    return int(not all(bar.is_met for bar in counted_bars))


if __name__ == "__main__":
    sys.exit(main())
