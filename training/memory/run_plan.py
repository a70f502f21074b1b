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
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

from common.atomic import write_file
from common.errors import ConfigError
from training.config import TrainConfig, to_yaml
from training.memory.changes import as_options, changed_config
from training.memory.phase_memory import PREVIEW

PROJECT = Path(__file__).resolve().parent.parent.parent
PROGRAM = "import sys, train_lora; sys.exit(train_lora.main(sys.argv[1:]))"
PLAN_VERSION = 1
"""Raise it when plans change."""
PLANNED_BY = ("torch", "diffusers", "transformers", "peft")
"""Packages on whose versions a plan depends."""
TIMEOUT = 480
"""Seconds for a plan. The other processes wait for it no longer than for a collective."""
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
GIB = 2**30
Plan = dict[str, Any]
"""The JSON of the command `plan`."""


class UnplannableError(Exception):
    """A run whose memory cannot be planned."""


def fit_run(
    config: TrainConfig, accelerator: Accelerator, say: Callable[[str], None]
) -> TrainConfig:
    """Return the config with options changed so that the run fits into `memory.budget`. Collective.

    Raises ConfigError if nothing fits."""
    budget = budget_of(config, accelerator)
    if budget is None:
        return config
    is_required = config.memory.budget != "check"
    try:
        plan = shared_plan(config, accelerator, budget)
    except UnplannableError as error:
        if is_required:
            raise ConfigError(f"--memory.budget {config.memory.budget}: {error}") from error
        say(f"note: the memory of this run is not planned: {error}")
        return config
    needed, phase = need_of(plan)
    if needed <= budget:
        say(f"memory      {gib(needed)} of {gib(budget)} GiB are needed by plan ({phase})")
    elif not is_required or not plan["budget"]["fits"]:
        raise ConfigError(too_large(config, plan, budget))
    if not is_required:
        preview = plan["phases"].get(PREVIEW)
        if preview is not None and preview["total"] + plan["reserve"] > budget:
            say(
                f"note: previews need {gib(preview['total'] + plan['reserve'])} GiB by plan. Use "
                "--model.text_encoder_placement layers, or --no_preview"
            )
        return config
    changes = plan["budget"]["options"]
    if changes:
        say(f"memory      options for {gib(budget)} GiB: {as_options(changes)}")
    return changed_config(config, changes)


def budget_of(config: TrainConfig, accelerator: Accelerator) -> int | None:
    """Return the bytes that the run may take, or None if it is not planned. Collective."""
    budget = config.memory.budget
    if budget == "none" or accelerator.distributed_type in SHARDED:
        return None
    if config.memory.budget_bytes is not None:
        return config.memory.budget_bytes
    if accelerator.device.type != "cuda":
        return None
    _, size = torch.cuda.mem_get_info(accelerator.device)
    sizes = [size]
    if accelerator.num_processes > 1:
        sizes = gather_object(sizes)
    return min(sizes)


def shared_plan(config: TrainConfig, accelerator: Accelerator, budget: int) -> Plan:
    """Return the plan of the main process on all processes. Collective.

    Raises UnplannableError with the reason."""
    results: list[Any] = [None]
    if accelerator.is_main_process:
        is_gpu = accelerator.device.type != "cpu"
        results = [plan_or_error(config, budget, is_gpu)]
    if accelerator.num_processes > 1:
        broadcast_object_list(results)
    (result,) = results
    if isinstance(result, str):
        raise UnplannableError(result)
    return result


def plan_or_error(config: TrainConfig, budget: int, is_gpu: bool) -> Plan | str:
    """Return the plan, or the reason that it failed. Plans are kept in `data.cache_dir`."""
    device = "gpu" if is_gpu else "cpu"
    options = ["--json", f"--device={device}", f"--memory.budget={budget / GIB:.4f}GB"]
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
    facts = [str(PLAN_VERSION), to_yaml(replace(config, **steps_and_folder)), *options]  # type: ignore[arg-type]
    for package in PLANNED_BY:
        facts.append(f"{package} {version(package)}")
    if config.model.path is not None:
        with suppress(OSError):
            facts.append(str(Path(config.model.path).stat().st_mtime_ns))
    name = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return Path(config.data.cache_dir) / "plans" / f"{name}.json"


def run_plan_command(config: TrainConfig, options: list[str]) -> Plan | str:
    """Run the command `plan`; return its plan, or the reason that it failed."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "run.yaml"
        recipe.write_text(to_yaml(config), encoding="utf-8")
        try:
            result = subprocess.run(
                [sys.executable, "-c", PROGRAM, "plan", str(recipe), *options],
                capture_output=True,
                text=True,
                env=environment(),
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"the plan took longer than {TIMEOUT} seconds"
    try:
        plan: Plan = json.loads(result.stdout)
    except ValueError:
        lines = result.stderr.strip().splitlines() or ["the plan failed"]
        return lines[-1].strip()
    return plan


def environment() -> dict[str, str]:
    """Return the environment of a process without GPU that no launcher has started."""
    variables = {}
    for name, value in os.environ.items():
        if name not in LAUNCHER_VARIABLES and not name.startswith(("ACCELERATE_", "TORCHELASTIC_")):
            variables[name] = value
    paths = [str(PROJECT), os.environ.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def need_of(plan: Plan) -> tuple[int, str]:
    """Return the bytes that a run needs besides its preview, and the phase that needs them."""
    totals = {}
    for name, phase in plan["phases"].items():
        if name != PREVIEW:
            totals[name] = phase["total"]
    largest = max(totals, key=lambda name: totals[name])
    return totals[largest] + plan["reserve"], largest


def too_large(config: TrainConfig, plan: Plan, budget: int) -> str:
    """Return the error of a run that does not fit."""
    needed, phase = need_of(plan)
    lines = [
        f"--memory.budget {config.memory.budget}: the run needs {gib(needed)} GiB by plan ({phase}); "
        f"expected at most {gib(budget)} GiB."
    ]
    fit, least = plan["budget"], plan.get("least")
    if fit["fits"]:
        lines.append(f"It fits with: {as_options(fit['options'])}")
    elif least is not None and least["fits"]:
        lines.append(f"It fits with changes of the result: {as_options(least['options'])}")
    else:
        lines.append("No options of this trainer make it fit. Use a smaller --data.resolution")
    if config.memory.budget == "check":
        lines.append(
            "Use --memory.budget auto to change options in this run, or none to train without a plan"
        )
    return "\n".join(lines)


def gib(num_bytes: int) -> str:
    """Return a size in GiB."""
    return f"{num_bytes / GIB:.1f}"
