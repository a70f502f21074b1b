"""Effect of options on the validation loss: `python benchmarks/quality.py [--demo flow]
[--groups loss,EMA] [--seeds 3]`.

An emoji demo is trained for the same number of steps with each choice of an option, over
several seeds. Validation is the plain squared error of held-out images at fixed noise levels,
with every training objective, so the numbers are comparable. Each group of choices has a table.
It shows the loss after the last step and the lowest loss, with the standard deviation over
seeds. It also shows the loss of the thirds of the noise levels with the least, medium and most
noise. `--out FILE` keeps the result of each run as a JSON line; runs that are in the file are
not repeated. `--tiny` only tests that everything runs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
STEPS = 150
VALIDATE_EVERY = 25
COMMON_OPTIONS = [
    "--no_preview",
    "--ema.decay=0",
    "--objective.loss_weighting=none",
    "--checkpoint.every=0",
    "--checkpoint.every_minutes=0",
    "--tracking.log_every=1000",
]
LEARNING_RATES = ("5e-4", "1e-3", "2e-3", "4e-3", "8e-3")

MILLION_PARAMETERS = {
    "LoRA": ("--rank=16", "--adapter.alpha=16"),
    "DoRA": ("--rank=16", "--adapter.alpha=16"),
    "LoHa": ("--rank=8", "--adapter.alpha=8"),
    "GLoRA": ("--rank=10", "--adapter.alpha=10"),
    "LoKr": ("--adapter.full_matrix", "--adapter.factor=3"),
    "OFT": ("--adapter.block_size=64",),
    "BOFT": ("--adapter.block_size=14",),
    "Full (five million)": (),
}
"""Options with which each algorithm has about a million parameters."""
Result = dict[str, Any]
"""`key` of a run, number of trained `parameters`, and the list of its `validation` losses."""

Groups = dict[str, dict[str, tuple[str, ...]]]
"""Group -> choice -> options of the trainer."""

EPSILON_GROUPS: Groups = {
    "loss space": {
        "prediction (default)": (),
        "x0": ("--objective.loss_space=x0",),
    },
    "timestep sampling": {
        "uniform (default)": (),
        "logit-normal 0, 1": ("--objective.timestep_sampling=logit-normal",),
        "logit-normal 0.5, 1": (
            "--objective.timestep_sampling=logit-normal",
            "--objective.logit_mean=0.5",
        ),
        "mode 1.29": ("--objective.timestep_sampling=mode",),
        "beta 2, 2": ("--objective.timestep_sampling=beta",),
        "beta 3, 1": (
            "--objective.timestep_sampling=beta",
            "--objective.beta_a=3",
            "--objective.beta_b=1",
        ),
    },
    "stratified": {
        "independent (default)": (),
        "stratified": ("--objective.stratified_timesteps",),
    },
    "weighting": {
        "none (default)": (),
        "min-snr 5": ("--objective.loss_weighting=min-snr",),
        "debiased": ("--objective.loss_weighting=debiased",),
        "p2 1, 1": ("--objective.loss_weighting=p2",),
    },
    "loss": {
        "MSE (default)": (),
        "L1": ("--loss_function=L1",),
        "Huber 0.1": ("--loss_function=Huber", "--objective.huber_delta=0.1"),
        "Huber 0.1, snr": (
            "--loss_function=Huber",
            "--objective.huber_delta=0.1",
            "--objective.huber_schedule=snr",
        ),
    },
    "noise": {
        "plain (default)": (),
        "offset 0.05": ("--objective.noise_offset=0.05",),
        "multires 6, 0.3": (
            "--objective.multires_noise_iterations=6",
            "--objective.multires_noise_discount=0.3",
        ),
        "input perturbation 0.1": ("--objective.input_perturbation=0.1",),
    },
    "alpha and learning rate": {
        f"alpha {alpha}, {rate}": (f"--adapter.alpha={alpha}", f"--learning_rate={rate}")
        for alpha in (1, 8, 16, 32)
        for rate in LEARNING_RATES
    },
    "EMA": {
        "none (default)": (),
        "0.9": ("--ema.decay=0.9",),
        "0.98": ("--ema.decay=0.98",),
        "0.995": ("--ema.decay=0.995",),
    },
    "EMA at a constant rate": {
        "none": ("--optim.lr_scheduler=constant",),
        "0.9": ("--optim.lr_scheduler=constant", "--ema.decay=0.9"),
        "0.98": ("--optim.lr_scheduler=constant", "--ema.decay=0.98"),
    },
    "algorithm at about a million parameters": {
        f"{name}, {rate}": (f"--algorithm={name.split()[0]}", *options, f"--learning_rate={rate}")
        for name, options in MILLION_PARAMETERS.items()
        for rate in ("2e-4", *LEARNING_RATES)
    },
}
FLOW_GROUPS: Groups = {
    "loss space": EPSILON_GROUPS["loss space"],
    "timestep sampling": {
        **EPSILON_GROUPS["timestep sampling"],
        "cosmap": ("--objective.timestep_sampling=cosmap",),
    },
    "shift": {
        "1 (default)": (),
        "2": ("--objective.shift=2",),
        "3": ("--objective.shift=3",),
    },
    "stratified": EPSILON_GROUPS["stratified"],
    "weighting": {
        "none (default)": (),
        "cosmap": ("--objective.loss_weighting=cosmap",),
        "inverse-sigma2": ("--objective.loss_weighting=inverse-sigma2",),
        "min-snr 5": ("--objective.loss_weighting=min-snr",),
    },
    "loss": EPSILON_GROUPS["loss"],
    "alpha and learning rate": {
        f"alpha {alpha}, {rate}": (f"--adapter.alpha={alpha}", f"--learning_rate={rate}")
        for alpha in (1, 16, 32)
        for rate in LEARNING_RATES
    },
    "EMA": EPSILON_GROUPS["EMA"],
    "algorithm at rank 16": {
        f"{name}, {rate}": (f"--algorithm={name}", f"--learning_rate={rate}")
        for name in ("LoRA", "DoRA", "LoHa", "GLoRA")
        for rate in LEARNING_RATES[:4]
    },
}


@dataclass(frozen=True)
class Demo:
    """A demo, and the choices that are measured on it."""

    recipe: Path
    base: str
    """Folder of the base model in examples/emoji."""
    style: str
    """Folder of the images in examples/emoji."""
    groups: Groups

    @cached_property
    def content_hash(self) -> str:
        """Hash of all that a run has beside its options: recipe, base model and images."""
        digest = hashlib.sha256(" ".join(COMMON_OPTIONS).encode())
        digest.update(self.recipe.read_bytes())
        for folder in (self.base, self.style):
            for path in sorted((PROJECT / "examples" / "emoji" / folder).rglob("*")):
                if path.is_file():
                    digest.update(path.read_bytes())
        return digest.hexdigest()[:8]


DEMOS = {
    "epsilon": Demo(PROJECT / "recipes" / "demo.yaml", "base", "screen_print", EPSILON_GROUPS),
    "flow": Demo(PROJECT / "recipes" / "demo_flow.yaml", "flow_base", "blue_tile", FLOW_GROUPS),
}
"""Kind of prediction of the base model -> its demo."""


@dataclass(frozen=True)
class Job:
    """One training run."""

    demo: Demo
    group: str
    choice: str
    seed: int
    steps: int

    @property
    def options(self) -> tuple[str, ...]:
        return self.demo.groups[self.group][self.choice]

    @property
    def key(self) -> str:
        """Return the name of the run, the same in all groups that contain it."""
        parts = [
            *sorted(self.options),
            f"seed {self.seed}",
            f"steps {self.steps}",
            f"demo {self.demo.content_hash}",
        ]
        return " ".join(parts)


def train(job: Job, folder: Path) -> Result:
    """Train; return the validation losses and the number of parameters."""
    out = folder / f"{abs(hash(job.key)):x}"
    command = [
        sys.executable,
        str(PROJECT / "train_lora.py"),
        str(job.demo.recipe),
        *COMMON_OPTIONS,
        f"--steps={job.steps}",
        f"--validation.every={min(VALIDATE_EVERY, job.steps)}",
        f"--seed={job.seed}",
        f"--output_dir={out}",
        f"--data.cache_dir={folder / 'cache'}",
        *job.options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if process.returncode:
        raise SystemExit(
            f"{job.choice}: exit code {process.returncode}\n{process.stdout}\n{process.stderr}"
        )
    lines = process.stdout.splitlines()
    count = next(line for line in lines if line.startswith("trainable")).split()[1]
    losses = json.loads((out / "loss.json").read_text(encoding="utf-8"))
    return {
        "key": job.key,
        "parameters": int(count.replace(",", "")),
        "validation": losses["validation"],
    }


def train_all(jobs: list[Job], folder: Path, num_workers: int) -> Iterator[Result]:
    """Yield the result of each job. The first job runs alone, because it encodes the images."""
    if jobs:
        yield train(jobs[0], folder)
    with ThreadPoolExecutor(num_workers) as pool:
        yield from pool.map(lambda job: train(job, folder), jobs[1:])


def results(jobs: list[Job], out: Path | None, num_workers: int) -> dict[str, Result]:
    """Return the result of each job by its key. Jobs whose results are in `out` do not run
    again."""
    by_key: dict[str, Result] = {}
    if out is not None and out.is_file():
        for line in out.read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            by_key[result["key"]] = result
    new_jobs = list({job.key: job for job in jobs if job.key not in by_key}.values())
    with tempfile.TemporaryDirectory() as folder:
        for number, result in enumerate(train_all(new_jobs, Path(folder), num_workers), 1):
            key, loss = result["key"], result["validation"][-1]["loss"]
            by_key[key] = result
            if out is not None:
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
            print(f"{number} of {len(new_jobs)}: {loss:.4f}  {key}", file=sys.stderr, flush=True)
    return by_key


def mean_and_deviation(values: list[float]) -> str:
    """Return the mean and the standard deviation as text."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{mean(values):.4f} +- {stdev(values):.4f}"


def mean_of_thirds(entry: dict[str, float]) -> list[float]:
    """Return the mean loss of the noise levels with the least, medium and most noise."""
    levels = [loss for name, loss in entry.items() if name.startswith("quantile_")]
    size = max(1, len(levels) // 3)
    return [mean(levels[:size]), mean(levels[size:-size] or levels), mean(levels[-size:])]


def table(group: str, jobs: list[Job], by_key: dict[str, Result]) -> str:
    """Return the choices of a group's jobs as a table in Markdown, with the lowest last loss in
    bold."""
    lines = [
        f"### {group}",
        "",
        "| choice | parameters | last | lowest | at step | little noise | medium | much |",
        "|---|---|---|---|---|---|---|---|",
    ]
    mean_losses = {}
    rows = {}
    for choice in dict.fromkeys(job.choice for job in jobs):
        runs = [by_key[job.key] for job in jobs if job.choice == choice]
        last_entries = [run["validation"][-1] for run in runs]
        best_entries = [min(run["validation"], key=lambda entry: entry["loss"]) for run in runs]
        thirds = zip(*map(mean_of_thirds, last_entries), strict=True)
        last_losses = [entry["loss"] for entry in last_entries]
        mean_losses[choice] = mean(last_losses)
        rows[choice] = [
            f"{runs[0]['parameters']:,}",
            mean_and_deviation(last_losses),
            mean_and_deviation([entry["loss"] for entry in best_entries]),
            f"{mean(entry['step'] for entry in best_entries):.0f}",
            *(f"{mean(values):.4f}" for values in thirds),
        ]
    for choice, cells in rows.items():
        if mean_losses[choice] == min(mean_losses.values()):
            cells[1] = f"**{cells[1]}**"
        lines.append(f"| {choice} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Train all choices, and print a table per group."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", choices=DEMOS, default="epsilon", help="demo to measure on")
    parser.add_argument("--groups", help="groups to measure, separated by commas; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of each choice")
    parser.add_argument(
        "--jobs", type=int, default=1, help="number of runs at a time; each has one thread"
    )
    parser.add_argument("--out", type=Path, help="file of JSON lines to which results are added")
    parser.add_argument(
        "--tiny", action="store_true", help="two steps, one seed, two choices of each group"
    )
    options = parser.parse_args()
    steps, seeds = (2, range(1)) if options.tiny else (STEPS, range(options.seeds))
    demo = DEMOS[options.demo]
    groups = list(demo.groups)
    if options.groups:
        groups = [name.strip() for name in options.groups.split(",")]
    unknown_groups = [name for name in groups if name not in demo.groups]
    if unknown_groups:
        parser.error(
            f"--groups {','.join(unknown_groups)}: unknown group; expected {', '.join(demo.groups)}"
        )
    jobs_by_group: dict[str, list[Job]] = {}
    for group in groups:
        choices = list(demo.groups[group])
        if options.tiny:
            choices = choices[:2]
        jobs_by_group[group] = [
            Job(demo, group, choice, seed, steps) for seed in seeds for choice in choices
        ]
    all_jobs = [job for jobs in jobs_by_group.values() for job in jobs]
    by_key = results(all_jobs, options.out, options.jobs)
    for group, jobs in jobs_by_group.items():
        print(table(group, jobs, by_key))


if __name__ == "__main__":
    main()
