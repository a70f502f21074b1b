"""The plan of a run's memory as text and as JSON."""

from typing import Any

from tools.tables import align_columns
from training.config import TrainConfig
from training.memory.budget import RESERVE, Fit
from training.memory.phases import CATEGORIES, PhaseMemory
from training.memory.planner import MemoryPlanner

GIB = 2**30
NOTES = (
    "One process that holds the whole model; longest captions, largest bucket. "
    "Not run on a GPU yet."
)


def plan_as_text(
    config: TrainConfig, planner: MemoryPlanner, phases: list[PhaseMemory], fit: Fit | None
) -> str:
    """Return the table of the phases, and the options with which the run fits."""
    lines = [title(config, planner), *phase_table(phases)]
    peak = max(phases, key=lambda phase: phase.total)
    if planner.is_gpu:
        needed = peak.total + RESERVE
        lines.append(
            f"Peak: {gib(peak.total)} GiB ({peak.name}). With {gib(RESERVE)} GiB for CUDA itself, "
            f"the GPU needs {gib(needed)} GiB."
        )
    else:
        lines.append(f"Peak: {gib(peak.total)} GiB ({peak.name}).")
    lines.append(NOTES)
    if fit is not None:
        lines += ["", *fit_lines(fit)]
    return "\n".join(lines)


def title(config: TrainConfig, planner: MemoryPlanner) -> str:
    """Return one line on what is planned."""
    _, *frames, height, width = planner.sample.pixels
    size = f"{width}x{height}"
    if frames:
        size += f", {frames[0]} frames"
    quantization = config.model.quantization
    base = config.training_dtype if quantization == "none" else quantization
    return (
        f"{config.model.path}: {config.algorithm} rank {config.rank}, {size}, "
        f"batch {config.batch_size}, base in {base}. In GiB:"
    )


def phase_table(phases: list[PhaseMemory]) -> list[str]:
    """Return the lines of a table: phases x categories, with the peak of each phase."""
    categories = []
    for category in CATEGORIES:
        if any(phase.num_bytes.get(category) for phase in phases):
            categories.append(category)
    rows = [["phase", *categories, "total"]]
    for phase in phases:
        cells = []
        for category in categories:
            num_bytes = phase.num_bytes.get(category, 0)
            cells.append(gib(num_bytes) if num_bytes else "-")
        rows.append([phase.name, *cells, gib(phase.total)])
    return align_columns(rows)


def fit_lines(fit: Fit) -> list[str]:
    """Return what to change so that the run fits into the budget."""
    if not fit.changes and fit.fits:
        return [f"Fits into {gib(fit.budget)} GiB as it is."]
    options = " ".join(as_option(name, value) for name, value in fit.changes.items())
    if fit.fits:
        lines = [f"Fits into {gib(fit.budget)} GiB with: {options}"]
    else:
        lines = [
            f"Does not fit into {gib(fit.budget)} GiB. It needs {gib(fit.peak)} GiB with: {options}"
        ]
    if fit.result_changes:
        names = ", ".join(f"--{name}" for name in fit.result_changes)
        lines.append(f"These change the result a little: {names}.")
    return [*lines, *phase_table(fit.phases)]


def as_option(name: str, value: object) -> str:
    """Return an option as it is written on the command line."""
    if value is True:
        return f"--{name}"
    if value is False:
        section, _, field = name.rpartition(".")
        return f"--{section}.no_{field}" if section else f"--no_{field}"
    return f"--{name} {value}"


def plan_as_json(phases: list[PhaseMemory], fit: Fit | None) -> dict[str, Any]:
    """Return the plan as values for JSON; sizes are in bytes."""
    plan: dict[str, Any] = {"phases": phases_as_json(phases), "reserve": RESERVE}
    if fit is not None:
        plan["budget"] = {
            "bytes": fit.budget,
            "fits": fit.fits,
            "options": fit.changes,
            "phases": phases_as_json(fit.phases),
        }
    return plan


def phases_as_json(phases: list[PhaseMemory]) -> dict[str, Any]:
    return {phase.name: {**phase.num_bytes, "total": phase.total} for phase in phases}


def gib(num_bytes: int) -> str:
    """Return a size in GiB, with more digits for tiny models."""
    size = num_bytes / GIB
    return f"{size:.1f}" if size >= 1 or not num_bytes else f"{size:.2g}"
