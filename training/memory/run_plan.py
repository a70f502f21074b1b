"""The plan of a run's memory at its start, before anything is encoded.

The command `plan` makes it in another process, which has no GPU and its own Accelerate.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from common.announce import announced
from common.atomic import write_file
from common.errors import ConfigError
from training.config import TrainConfig, to_yaml
from training.distributed.sharding import SHARDING_ENGINES
from training.memory.changes import as_options, changed_config
from training.memory.config import GIB
from training.memory.kept_changes import keep_changes, kept_changes
from training.memory.phase_memory import CAPTIONS, HOST, IMAGES, SAMPLES, TRAINING, VALIDATION

PROJECT = Path(__file__).resolve().parent.parent.parent
SCRIPT = PROJECT / "train_lora.py"
PLAN_VERSION = 1
"""Raise it when plans change."""
PLANNED_BY = ("torch", "diffusers", "transformers", "peft")
"""Packages on whose versions a plan depends."""
TIMEOUT = 480.0
"""Most seconds for a plan."""
TIMEOUT_SHARE = 0.8
"""Share of the time that other processes wait in a collective, which a plan may take."""
LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_",
    "ACCELERATE_", "TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_", "MV2_", "SLURM_",
)  # fmt: skip
"""Beginnings of the names of variables that launchers set."""
TOLERANCE = 1.1
"""Factor by which a plan may exceed a GPU before `check` stops the run: no plan was compared with a
real GPU yet."""
Plan = dict[str, Any]
"""The JSON of the command `plan`."""


class FittedRun(NamedTuple):
    """A config that fits into the budget, and the plan of its phases."""

    config: TrainConfig
    planned: dict[str, int]
    """Phase -> bytes on the GPU; empty if the run was not planned."""


class UnplannableError(Exception):
    """A run whose memory cannot be planned."""


def fit_run(config: TrainConfig, accelerator: Accelerator, say: Callable[[str], None]) -> FittedRun:
    """Return the config with options changed so that the run fits into `memory.budget`. Collective.

    Raises ConfigError if nothing fits."""
    budget = budget_of(config, accelerator)
    if budget is None:
        return FittedRun(config, {})
    say("memory      planning; --memory.budget none skips this")
    is_required = config.memory.chooses_options
    try:
        with announced("planning the memory"):
            plan = shared_plan(config, accelerator, budget)
    except UnplannableError as error:
        if is_required:
            raise ConfigError(f"--memory.budget {config.memory.budget}: {error}") from error
        say(f"note: the memory of this run is not planned: {error}")
        return FittedRun(config, {})
    if not is_required:
        check_plan(config, plan, budget, say)
        return FittedRun(config, totals_of(plan["phases"]))
    if not plan["budget"]["fits"]:
        raise ConfigError(too_large(config, plan, budget))
    changes = {**plan["kept"], **plan["budget"]["options"]}
    if changes:
        say(f"memory      options for {gib(budget)} GiB: {as_options(changes)}")
    else:
        say(f"memory      fits into {gib(budget)} GiB without changes")
    phases = plan["budget"]["phases"]
    host_bytes = max(phase.get(HOST, 0) for phase in phases.values())
    say_host_memory(host_bytes, say)
    if accelerator.is_main_process:
        keep_changes(config, changes)
    return FittedRun(changed_config(config, changes), totals_of(phases))


def totals_of(phases: dict[str, dict[str, int]]) -> dict[str, int]:
    """Return the bytes on the GPU of each planned phase."""
    return {name: values["total"] for name, values in phases.items()}


def check_plan(config: TrainConfig, plan: Plan, budget: int, say: Callable[[str], None]) -> None:
    """Say what the plan needs. Raises ConfigError if training does not fit.

    Only notes concern phases after which nothing is lost: encoding and samples."""
    needed, phase = need_of(plan)
    say(f"memory      the plan needs {gib(needed)} of {gib(budget)} GiB (most in: {phase})")
    if is_too_large(plan, budget):
        raise ConfigError(too_large(config, plan, budget))
    for name, values in plan["phases"].items():
        total = values["total"] + plan["reserve"]
        if total <= budget:
            continue
        if name == SAMPLES:
            advice = "--model.vae_tiling, or --no_preview and --sample.every 0"
        elif name == CAPTIONS:
            advice = "--model.text_encoder_placement layers"
        elif name == IMAGES:
            advice = "a smaller --data.encode_pixels"
        else:
            advice = "--memory.budget auto"
        say(f"note: the plan of `{name}` needs {gib(total)} GiB. If that fails, use {advice}")


def say_host_memory(host_bytes: int, say: Callable[[str], None]) -> None:
    """Print a note if offloading takes more CPU memory than this computer has for each process."""
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = psutil.virtual_memory().available
    if host_bytes * num_processes > available:
        say(
            f"note: offloading takes {gib(host_bytes)} GiB of CPU memory in each of {num_processes} "
            f"processes; {gib(available)} GiB are free"
        )


def budget_of(config: TrainConfig, accelerator: Accelerator) -> int | None:
    """Return the bytes that the run may take, or None if it is not planned. Collective."""
    budget = config.memory.budget
    if budget == "none" or accelerator.distributed_type in SHARDING_ENGINES:
        return None
    if config.memory.budget_bytes is not None:
        return config.memory.budget_bytes
    if accelerator.device.type != "cuda":
        if budget == "auto":
            raise ConfigError(
                "--memory.budget auto: needs a GPU; expected a size such as 12GB. Write a size, or none"
            )
        return None
    free, size = torch.cuda.mem_get_info(accelerator.device)
    if budget == "auto":
        size = free  # other programs may use the GPU too
    sizes = [size]
    if accelerator.num_processes > 1:
        sizes = gather_object(sizes)
    return min(sizes)


def shared_plan(config: TrainConfig, accelerator: Accelerator, budget: int) -> Plan:
    """Return the plan of the main process on all processes. Collective.

    Raises UnplannableError with the reason."""
    results: list[Any] = [None]
    if accelerator.is_main_process:
        earlier_changes = kept_changes(config)
        if earlier_changes:  # the options that change the result are chosen
            config = changed_config(config, {**earlier_changes, "memory.allow": ()})
        device = "gpu" if accelerator.device.type != "cpu" else "cpu"
        result = plan_or_error(config, budget, device)
        if isinstance(result, dict):
            result["kept"] = earlier_changes
        results = [result]
    if accelerator.num_processes > 1:
        broadcast_object_list(results)
    (result,) = results
    if isinstance(result, str):
        raise UnplannableError(result)
    return result


def plan_or_error(config: TrainConfig, budget: int, device: str) -> Plan | str:
    """Return the plan, or the reason that it failed.

    `check` looks for options only if the run does not fit."""
    options = ["--json", f"--device={device}"]
    if not config.memory.chooses_options:
        result = kept_or_new_plan(config, [*options, "--memory.budget=none"])
        if isinstance(result, str) or not is_too_large(result, budget):
            return result
    return kept_or_new_plan(config, [*options, f"--memory.budget={budget / GIB:.4f}GB"])


def kept_or_new_plan(config: TrainConfig, options: list[str]) -> Plan | str:
    """Return the plan, or the reason that it failed. Plans are kept in `data.cache_dir`."""
    kept_path = plan_path(config, options)
    with suppress(OSError, ValueError):
        kept_plan: Plan = json.loads(kept_path.read_text(encoding="utf-8"))
        return kept_plan
    result = run_plan_command(config, options)
    if isinstance(result, dict):
        kept_path.parent.mkdir(parents=True, exist_ok=True)
        write_file(kept_path, json.dumps(result))
    return result


def plan_path(config: TrainConfig, options: list[str]) -> Path:
    """Return the file of a plan. It depends on all that a plan depends on, as far as this can be
    seen at once."""
    steps_and_folder = {"steps": 1, "output_dir": "run"}
    planned_config = changed_config(config, steps_and_folder)
    facts = [str(PLAN_VERSION), to_yaml(planned_config), *options]
    for package in PLANNED_BY:
        facts.append(f"{package} {version(package)}")
    for path in (config.model.path, config.model.assistant_lora):
        if path is not None:
            with suppress(OSError):
                facts.append(str(Path(path).stat().st_mtime_ns))
    name = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return Path(config.data.cache_dir) / "plans" / f"{name}.json"


def run_plan_command(config: TrainConfig, options: list[str]) -> Plan | str:
    """Run the command `plan`; return its plan, or the reason that it failed."""
    timeout = min(TIMEOUT, TIMEOUT_SHARE * 60 * config.distributed.timeout_minutes)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "run.yaml"
        recipe.write_text(to_yaml(config), encoding="utf-8")
        try:
            result = subprocess.run(
                [sys.executable, str(SCRIPT), "plan", str(recipe), *options],
                capture_output=True,
                text=True,
                env=environment(),
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"the plan took longer than {timeout:.0f} seconds"
    try:
        plan: Plan = json.loads(result.stdout)
    except ValueError:
        _, _, message = result.stderr.rpartition("error: ")
        return " ".join(message.split()) or "the plan failed"
    return plan


def environment() -> dict[str, str]:
    """Return the environment of a process without GPU that no launcher has started."""
    variables = {}
    for name, value in os.environ.items():
        if not name.startswith(LAUNCHER_VARIABLES):
            variables[name] = value
    variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def need_of(plan: Plan) -> tuple[int, str]:
    """Return the bytes that training and validation need, and the phase that needs most."""
    totals = {}
    for name in (TRAINING, VALIDATION):
        if name in plan["phases"]:
            totals[name] = plan["phases"][name]["total"]
    largest = max(totals, key=lambda name: totals[name])
    return totals[largest] + plan["reserve"], largest


def is_too_large(plan: Plan, budget: int) -> bool:
    """Return whether `check` stops a run with this plan."""
    needed, _ = need_of(plan)
    return needed > TOLERANCE * budget


def too_large(config: TrainConfig, plan: Plan, budget: int) -> str:
    """Return the error of a run that does not fit."""
    needed, phase = need_of(plan)
    lines = [
        f"--memory.budget {config.memory.budget}: the plan needs {gib(needed)} GiB (most in: {phase}); "
        f"the budget is {gib(budget)} GiB."
    ]
    fit, full_fit = plan["budget"], plan.get("least")
    if fit["fits"]:
        lines.append(f"It fits with: {as_options(fit['options'])}")
    elif full_fit is not None and full_fit["fits"]:
        lines.append(f"It fits with changes of the result: {as_options(full_fit['options'])}")
    else:
        lines.append(
            "No options of this trainer make it fit. Use a smaller --data.resolution or --rank"
        )
    if config.memory.budget == "check":
        lines.append(
            "Use --memory.budget auto to change options in this run, or none to train without a plan"
        )
    return "\n".join(lines)


def gib(num_bytes: int) -> str:
    """Return a size in GiB, with more digits for tiny models."""
    size = num_bytes / GIB
    return f"{size:.1f}" if size >= 10 else f"{size:.2g}"
