"""Correctness, speed and memory on a GPU: `python benchmarks/gpu.py [--minutes 8] [--out FILE]`.

Weights are random, and nothing is downloaded. The most telling measurements come first, and none
starts after `--minutes`. `--out FILE` keeps each result as a JSON line; results that the file has of
the same device and commit are not measured again. The exit code is 1 if a measurement failed.
`--device cpu --tiny` only tests that everything runs.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from training.numerics import prepare_environment  # noqa: E402

prepare_environment()

import torch  # noqa: E402

from benchmarks.gpu_layers import MAX_ERROR, SETTINGS, Context, layer_errors  # noqa: E402
from benchmarks.gpu_speed import SCENARIOS, measure_scenario  # noqa: E402

MAX_SECONDS = 900
"""Time that a script may take."""


@dataclass(frozen=True)
class Measurement:
    """A measurement with its name, which is its key in the file of results."""

    key: str
    run: Callable[[Context], dict[str, Any]]


def resumed_run(context: Context) -> dict[str, Any]:
    """Train the demo for 12 steps, and for 5 + 7; return whether the files are equal bit for bit."""
    from safetensors.torch import load_file

    recipe = str(PROJECT / "recipes" / "demo.yaml")
    common = [recipe, "--deterministic", "--no_preview", "--tracking.log_every=100"]
    with tempfile.TemporaryDirectory() as folder:
        common.append(f"--data.cache_dir={folder}/cache")
        for name, steps in (("whole", 12), ("parts", 5), ("parts", 12)):
            run_trainer([*common, f"--steps={steps}", f"--output_dir={folder}/{name}"], context)
        whole, parts = (
            load_file(f"{folder}/{name}/lora.safetensors") for name in ("whole", "parts")
        )
    assert whole.keys() == parts.keys()
    different = [name for name, tensor in whole.items() if not tensor.equal(parts[name])]
    assert not different, f"{len(different)} of {len(whole)} tensors differ"
    return {"tensors": len(whole)}


def run_trainer(options: list[str], context: Context) -> None:
    """Run train_lora.py. Raises AssertionError with its output if it fails."""
    environment = dict(os.environ)
    if context.device.type == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    run_python([str(PROJECT / "train_lora.py"), *options], environment)


def run_python(arguments: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a script. Raises AssertionError with its output if it fails."""
    process = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=MAX_SECONDS,
    )
    assert not process.returncode, process.stdout[-2000:] + process.stderr[-2000:]


def family_errors(trainer_options: tuple[str, ...], context: Context) -> dict[str, Any]:
    """Return tiny model -> largest relative error of its losses, in bf16 on the device against fp32
    on the CPU. Raises AssertionError."""
    with tempfile.TemporaryDirectory() as folder:
        exact = tiny_losses(Path(folder) / "cpu.json", "cpu", ("--training_dtype=fp32",), context)
        device = context.device.type
        measured = tiny_losses(Path(folder) / "device.json", device, trainer_options, context)
    errors, failures = {}, {}
    for name, losses in measured.items():
        texts = [text for text in (losses, exact[name]) if isinstance(text, str)]
        if texts:
            failures[name] = texts[0]
            continue
        pairs = zip(losses, exact[name], strict=True)
        errors[name] = max(abs(loss / expected - 1) for loss, expected in pairs)
        if not errors[name] <= MAX_ERROR:
            failures[name] = f"relative error {errors[name]:.3g}"
    assert not failures, json.dumps(failures)
    return errors


def tiny_losses(
    out: Path, device: str, trainer_options: tuple[str, ...], context: Context
) -> dict[str, Any]:
    """Run gpu_families.py; return model -> the loss of each step, or an error as text."""
    options = ["--device", device, *trainer_options]
    if context.is_tiny:
        options += ["--only", "z_image"]
    run_python([str(PROJECT / "benchmarks" / "gpu_families.py"), str(out), *options])
    losses: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return losses


def measurements() -> list[Measurement]:
    """Return all measurements, the most telling ones first."""
    first, *others = [
        Measurement(scenario.key, partial(measure_scenario, scenario)) for scenario in SCENARIOS
    ]
    families = Measurement("error of tiny models", partial(family_errors, ()))
    compile_options = ("--compile=blocks", "--no_gradient_checkpointing")
    compiled = partial(family_errors, compile_options)
    return [
        *layer_measurements("Linear", is_compiled=False),
        *layer_measurements("Conv2d", is_compiled=False),
        first,
        families,
        Measurement("the demo resumed, bit for bit", resumed_run),
        *others,
        *layer_measurements("Linear", is_compiled=True),
        Measurement("error of tiny models, compiled", compiled),
    ]


def layer_measurements(kind: str, is_compiled: bool) -> list[Measurement]:
    """Return a measurement of each algorithm on one layer."""
    ending = ", compiled" if is_compiled else ""
    return [
        Measurement(
            f"error of {measured.name}, {kind}{ending}",
            partial(layer_errors, measured, kind, is_compiled),
        )
        for measured in SETTINGS
    ]


def facts(device: torch.device) -> dict[str, str]:
    """Return what the results depend on."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    commit = subprocess.run(
        ["git", "-C", str(PROJECT), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "commit": commit or "unknown",
    }


def run_measurement(measurement: Measurement, context: Context) -> dict[str, Any]:
    """Return the result, or the error as a part of it."""
    start = time.perf_counter()
    result: dict[str, Any] = {"key": measurement.key}
    try:
        result["result"] = measurement.run(context)
    except torch.OutOfMemoryError:
        result["failed"] = "out of memory"
    except Exception as error:
        result["failed"] = f"{type(error).__name__}: {error}"[:2000]
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    result["took"] = round(time.perf_counter() - start, 1)
    return result


def table(results: list[dict[str, Any]], facts: dict[str, str]) -> str:
    """Return the results as Markdown."""
    lines = [", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    lines += [
        "| step of | ms | spread ms | x frozen | peak GB | waits |",
        "|---|---|---|---|---|---|",
    ]
    others = ["| measurement | result |", "|---|---|"]
    for result in results:
        key = result["key"]
        if "failed" in result:
            others.append(f"| {key} | FAILED: {result['failed'].splitlines()[0][:100]} |")
            continue
        values = []
        for name, value in result["result"].items():
            if isinstance(value, dict):
                lines.append(step_line(f"{key}: {name}", value))
            else:
                values.append(f"{name} {value:.2g}")
        if values:
            others.append(f"| {key} | {', '.join(values)} |")
    return "\n".join([*lines, "", *others])


def step_line(name: str, step: dict[str, Any]) -> str:
    """Return the row of a step: times, memory, and how often the host waited for the GPU."""
    cells = [
        name,
        f"{1000 * step['seconds']:.1f}",
        f"{1000 * step['spread']:.1f}",
        f"{step['ratio']:.3f}",
        f"{step['peak'] / 1e9:.2f}",
        str(len(step["waits"])),
    ]
    return f"| {' | '.join(cells)} |"


def earlier_results(out: Path | None, facts: dict[str, str]) -> list[dict[str, Any]]:
    """Return the successful results of the same device, commit and versions in a file."""
    if out is None or not out.is_file():
        return []
    lines = out.read_text(encoding="utf-8").splitlines()
    results: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [
        result for result in results if facts.items() <= result.items() and "failed" not in result
    ]


def main() -> int:
    """Measure, and print a table; return 1 if something failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=8, help="no measurement starts after so many (8)"
    )
    parser.add_argument("--out", type=Path, help="file of JSON lines to which results are added")
    parser.add_argument("--only", default="", help="measure only names that contain this text")
    parser.add_argument("--device", default="cuda", help="cuda (the default) or cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"--device cuda: PyTorch {torch.__version__} finds no GPU. Install a PyTorch with CUDA, or "
            "test that everything runs with --device cpu --tiny"
        )
    context = Context(torch.device(options.device), options.tiny)
    run_facts = {**facts(context.device), "size": "tiny" if options.tiny else "true"}
    results = earlier_results(options.out, run_facts)
    measured_keys = {result["key"] for result in results}
    start = time.perf_counter()
    for measurement in measurements():
        if measurement.key in measured_keys or options.only not in measurement.key:
            continue
        if time.perf_counter() - start > 60 * options.minutes:
            print(f"not measured, because {options.minutes:g} minutes are over: {measurement.key}")
            continue
        result = run_measurement(measurement, context)
        results.append(result)
        print(json.dumps(result), file=sys.stderr, flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**result, **run_facts}) + "\n")
    print(table(results, run_facts))
    failures = [result["failed"] for result in results if "failed" in result]
    return int(any(failure != "out of memory" for failure in failures))


if __name__ == "__main__":
    sys.exit(main())
