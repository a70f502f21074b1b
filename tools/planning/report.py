"""The plan of a run's memory as text and as JSON."""

from dataclasses import dataclass
from typing import Any

from common.errors import counted
from tools.tables import NO_VALUE, align_columns
from training.config import TrainConfig
from training.memory.budget import Fit
from training.memory.changes import as_options
from training.memory.config import GIB
from training.memory.phase_memory import CATEGORIES, PhaseMemory
from training.memory.planner import RESERVE, MemoryPlanner
from training.memory.sample_shape import planned_controls

ASSUMPTIONS = "Planned for one process, the longest captions and the largest bucket."
GPU_NOTE = "No plan has been compared with a real GPU yet."


@dataclass(frozen=True)
class Plan:
    """The phases of a run, and options with which it fits into a budget."""

    phases: list[PhaseMemory]
    fit: Fit | None
    """With changes that are allowed. None without a budget."""
    full_fit: Fit | None
    """With all changes, if nothing fits with those that are allowed."""
    reserve: int
    """Bytes that are not counted."""

    @property
    def exit_code(self) -> int:
        """2 if nothing fits, as for other options that cannot be used."""
        return 2 if self.full_fit is not None else 0


def plan_as_text(config: TrainConfig, planner: MemoryPlanner, plan: Plan) -> str:
    """Return the table of the phases, and the options with which the run fits."""
    lines = [title(config, planner)]
    lines += phase_table(plan.phases)
    lines.append(peak_line(plan.phases, planner.is_gpu))
    lines += host_lines(plan.phases)
    lines.append(f"{ASSUMPTIONS} {GPU_NOTE}" if planner.is_gpu else ASSUMPTIONS)
    if plan.fit is None:
        lines += search_hint(planner)
    else:
        lines.append("")
        lines += fit_lines(plan.fit)
    if plan.full_fit is not None:
        lines.append("")
        lines.append("With options that change the result (--memory.allow permits them):")
        lines += fit_lines(plan.full_fit)
    return "\n".join(lines)


def title(config: TrainConfig, planner: MemoryPlanner) -> str:
    """Return one line on what is planned."""
    _, *frames, height, width = planner.sample.pixels
    size = f"{width}x{height}"
    if frames:
        size += f", {frames[0]} frames"
    storage = planner.family.block_storage
    base = config.training_dtype if storage is None else storage
    num_controls = planned_controls(planner.config.data, planner.family)
    if num_controls:
        text = counted(num_controls, "control image")
        size += f" with {text}"
    facts = [
        f"{config.algorithm} rank {config.rank}",
        size,
        f"batch {config.batch_size}",
        f"base in {base}",
    ]
    return f"{config.model.path}: {', '.join(facts)}. In GiB:"


def peak_line(phases: list[PhaseMemory], is_gpu: bool) -> str:
    """Return the sentence on the phase that needs most."""
    peak = max(phases, key=lambda phase: phase.total)
    line = f"Peak: {gib(peak.total)} GiB ({peak.name})."
    if not is_gpu:
        return line
    needed = gib(peak.total + RESERVE)
    reserve = gib(RESERVE)
    return f"{line} With {reserve} GiB for CUDA itself, the GPU needs {needed} GiB."


def host_lines(phases: list[PhaseMemory]) -> list[str]:
    """Return a line on the CPU memory of what is offloaded, if there is any."""
    num_bytes = max(phase.host_bytes for phase in phases)
    if not num_bytes:
        return []
    return [f"What is offloaded takes {gib(num_bytes)} GiB of CPU memory."]


def search_hint(planner: MemoryPlanner) -> list[str]:
    """Return a line on how to find options that fit."""
    if not planner.is_gpu:
        return []
    return ["To find options that fit your card: --memory.budget 12GB, or another size."]


def phase_table(phases: list[PhaseMemory]) -> list[str]:
    """Return the lines of a table: phases x categories, with the peak of each phase."""
    categories = []
    for category in CATEGORIES:
        sizes = [phase.num_bytes.get(category, 0) for phase in phases]
        if any(sizes):
            categories.append(category)
    header = ["phase", *categories, "total"]
    rows = [header]
    for phase in phases:
        row: list[str] = [phase.name]
        for category in categories:
            num_bytes = phase.num_bytes.get(category, 0)
            row.append(gib(num_bytes))
        row.append(gib(phase.total))
        rows.append(row)
    return align_columns(rows)


def fit_lines(fit: Fit) -> list[str]:
    """Return what to change so that the run fits into the budget."""
    budget = f"{fit.budget / GIB:g}"
    if not fit.changes and fit.fits:
        return [f"Fits into {budget} GiB without changes."]
    options = as_options(fit.changes)
    if fit.fits:
        line = f"Fits into {budget} GiB with: {options}"
    else:
        needed = gib(fit.peak)
        line = f"Does not fit into {budget} GiB. It needs {needed} GiB with: {options}"
    lines = [line]
    if fit.result_changes:
        names = [f"--{name}" for name in fit.result_changes]
        listed = ", ".join(names)
        lines.append(f"These change the result: {listed}.")
    lines += phase_table(fit.phases)
    lines += host_lines(fit.phases)
    if fit.reserve:
        lines.append(
            f"With {gib(fit.reserve)} GiB for CUDA itself, the GPU needs {gib(fit.peak)} GiB."
        )
    return lines


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as values for JSON; sizes are in bytes."""
    values: dict[str, Any] = {
        "phases": phases_as_json(plan.phases),
        "reserve": plan.reserve,
    }
    if plan.fit is not None:
        values["budget"] = fit_as_json(plan.fit)
    if plan.full_fit is not None:
        values["least"] = fit_as_json(plan.full_fit)
    return values


def fit_as_json(fit: Fit) -> dict[str, Any]:
    return {
        "bytes": fit.budget,
        "fits": fit.fits,
        "needed": fit.peak,
        "options": fit.changes,
        "phases": phases_as_json(fit.phases),
    }


def phases_as_json(phases: list[PhaseMemory]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for phase in phases:
        values[phase.name] = {**phase.num_bytes, "total": phase.total}
    return values


def gib(num_bytes: int) -> str:
    """Return a size in GiB, with more digits for tiny models."""
    if not num_bytes:
        return NO_VALUE
    size = num_bytes / GIB
    return f"{size:.1f}" if size >= 1 else f"{size:.2g}"
