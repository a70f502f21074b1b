"""What each choice that has a default is worth: `python benchmarks/quality.py [--groups
density,ema] [--seeds 3]`.

The emoji demo is trained at equal steps under one choice after the other, over several seeds.
Validation is the plain squared error of held-out images at fixed noise levels, whatever was trained
for, so the numbers compare. A table per group: the loss after the last step and at its lowest, with
the standard deviation over seeds, and the loss of the third of the levels with the least, middling
and most noise. `--out FILE` keeps each run's result as a JSON line, and runs only those that are
not there yet. `--tiny`: whether it all runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
RECIPE = PROJECT / "recipes" / "demo.yaml"
STEPS, EVERY = 150, 25
FIXED = [
    "--no_preview",
    "--checkpoint.every=0",
    "--checkpoint.every_minutes=0",
    "--tracking.log_every=1000",
]
RATES = ("5e-4", "1e-3", "2e-3", "4e-3", "8e-3")

GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "loss space": {
        "prediction (default)": (),
        "x0": ("--objective.loss_space=x0",),
    },
    "density": {
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
        "each by itself (default)": (),
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
        for rate in RATES
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
        for name, options in {
            "LoRA": ("--rank=16", "--adapter.alpha=16"),
            "DoRA": ("--rank=16", "--adapter.alpha=16"),
            "LoHa": ("--rank=8", "--adapter.alpha=8"),
            "GLoRA": ("--rank=10", "--adapter.alpha=10"),
            "LoKr": ("--adapter.full_matrix", "--adapter.factor=3"),
            "OFT": ("--adapter.block_size=64",),
            "BOFT": ("--adapter.block_size=14",),
            "Full (five million)": (),
        }.items()
        for rate in ("2e-4", *RATES)
    },
}


@dataclass(frozen=True)
class Job:
    """One training."""

    group: str
    choice: str
    seed: int
    steps: int

    @property
    def options(self) -> tuple[str, ...]:
        return GROUPS[self.group][self.choice]

    @property
    def key(self) -> str:
        """The same for the same training, whatever table it stands in."""
        return " ".join([*sorted(self.options), f"seed {self.seed}", f"steps {self.steps}"])


def trained(job: Job, folder: Path) -> dict[str, Any]:
    """The validation losses of a training, and how many parameters it had."""
    out = folder / f"{abs(hash(job.key)):x}"
    command = [
        sys.executable,
        str(PROJECT / "train_lora.py"),
        str(RECIPE),
        *FIXED,
        f"--steps={job.steps}",
        f"--validation.every={min(EVERY, job.steps)}",
        f"--seed={job.seed}",
        f"--output_dir={out}",
        f"--data.cache_dir={folder / 'cache'}",
        *job.options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{job.choice}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    count = next(line for line in done.stdout.splitlines() if line.startswith("trainable"))
    history = json.loads((out / "loss.json").read_text(encoding="utf-8"))["validation"]
    return {
        "key": job.key,
        "parameters": int(count.split()[1].replace(",", "")),
        "validation": history,
    }


def results(jobs: Iterable[Job], out: Path | None, workers: int) -> dict[str, dict[str, Any]]:
    """The result of each job by its key; those that `out` has are not run again."""
    found: dict[str, dict[str, Any]] = {}
    if out is not None and out.is_file():
        for line in out.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[row["key"]] = row
    todo = list({job.key: job for job in jobs if job.key not in found}.values())
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        first = [
            trained(job, Path(folder)) for job in todo[:1]
        ]  # alone: it encodes the images for all
        for number, row in enumerate(
            chain(first, pool.map(lambda job: trained(job, Path(folder)), todo[1:])), 1
        ):
            found[row["key"]] = row
            if out is not None:
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            last = row["validation"][-1]["loss"]
            print(f"{number} of {len(todo)}: {last:.4f}  {row['key']}", file=sys.stderr, flush=True)
    return found


def spread(values: list[float]) -> str:
    return f"{mean(values):.4f} +- {stdev(values) if len(values) > 1 else 0:.4f}"


def thirds(entry: dict[str, float]) -> list[float]:
    """The mean loss of the levels with the least, middling and most noise."""
    levels = [loss for name, loss in entry.items() if name.startswith("quantile_")]
    size = max(1, len(levels) // 3)
    return [mean(levels[:size]), mean(levels[size:-size] or levels), mean(levels[-size:])]


def table(group: str, seeds: range, steps: int, found: dict[str, dict[str, Any]]) -> str:
    """A group's choices in Markdown, the lowest last loss in bold."""
    lines = [
        f"### {group}",
        "",
        "| choice | parameters | last | lowest | at step | little noise | middling | much |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = {}
    for choice in GROUPS[group]:
        runs = [found[Job(group, choice, seed, steps).key] for seed in seeds]
        last = [run["validation"][-1] for run in runs]
        best = [min(run["validation"], key=lambda entry: entry["loss"]) for run in runs]
        parts = [f"{mean(values):.4f}" for values in zip(*map(thirds, last), strict=True)]
        rows[choice] = (
            mean(entry["loss"] for entry in last),
            [
                f"{runs[0]['parameters']:,}",
                spread([entry["loss"] for entry in last]),
                spread([entry["loss"] for entry in best]),
                f"{mean(entry['step'] for entry in best):.0f}",
                *parts,
            ],
        )
    lowest = min(loss for loss, _ in rows.values())
    for choice, (loss, cells) in rows.items():
        cells[1] = f"**{cells[1]}**" if loss == lowest else cells[1]
        lines.append(f"| {choice} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", default=",".join(GROUPS), help="which tables, by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--jobs", type=int, default=1, help="trainings at a time, each with one thread"
    )
    parser.add_argument("--out", type=Path, help="a file of JSON lines that results are added to")
    parser.add_argument(
        "--tiny", action="store_true", help="two steps, one seed, two choices of each group"
    )
    options = parser.parse_args()
    steps, seeds = (2, range(1)) if options.tiny else (STEPS, range(options.seeds))
    groups = [name.strip() for name in options.groups.split(",")]
    if unknown := [name for name in groups if name not in GROUPS]:
        parser.error(f"no such group: {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    if options.tiny:
        for group in groups:
            GROUPS[group] = dict(list(GROUPS[group].items())[:2])
    jobs = [
        Job(group, choice, seed, steps)
        for group in groups
        for seed in seeds
        for choice in GROUPS[group]
    ]
    found = results(jobs, options.out, options.jobs)
    for group in groups:
        print(table(group, seeds, steps, found))


if __name__ == "__main__":
    main()
