"""`status`: prints what runs are doing, and which of them are dead."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common.text import one_line
from tools.runs.options import StatusOptions, run_folders
from tools.tables import NO_VALUE, align_columns
from training.reporting.liveness import condition_of
from training.reporting.status import Status, read_status

COLUMNS = ["run", "state", "phase", "step", "steps/s", "left", "loss", "GPU GiB", "seen"]
MAX_MESSAGE = 400
UNREADABLE = "unreadable"
BAD_CONDITIONS = ("dead", "stalled", "failed", UNREADABLE)
"""Conditions of runs that somebody should look at."""


def run(options: StatusOptions) -> int:
    """Print the table; return the exit code: 1 if a run needs attention."""
    now = time.time()
    runs: list[RunStatus] = []
    for name in options.folders:
        for folder in run_folders(Path(name)):
            runs.append(RunStatus.read(folder, now))
    if options.json:
        print(as_json(runs))
    else:
        print(as_table(runs, now))
    if any(run.condition in BAD_CONDITIONS for run in runs):
        return 1
    return 0


@dataclass(frozen=True)
class RunStatus:
    """The folder of a run, and its status."""

    folder: Path
    status: Status | None
    """None: status.json cannot be read."""
    condition: str

    @classmethod
    def read(cls, folder: Path, now: float) -> "RunStatus":
        """Read the status of a run. `now`: seconds since the epoch."""
        status = read_status(folder)
        if status is None:
            return cls(folder, None, UNREADABLE)
        return cls(folder, status, condition_of(status, now))


def as_json(runs: Sequence[RunStatus]) -> str:
    """Return the status of each run with its condition as JSON."""
    entries = []
    for run in runs:
        entry: dict[str, object] = {"folder": str(run.folder), "condition": run.condition}
        if run.status is not None:
            entry |= asdict(run.status)
        entries.append(entry)
    return json.dumps(entries, indent=1)


def as_table(runs: Sequence[RunStatus], now: float) -> str:
    """Return a line for each run, and below it the reason for which it ended."""
    rows = [COLUMNS]
    for run in runs:
        rows.append([str(run.folder), run.condition, *status_cells(run.status, now)])
    header, *lines = align_columns(rows, num_left=3)
    result = [header]
    for line, run in zip(lines, runs, strict=True):
        result.append(line)
        note = note_of(run, now)
        if note:
            result.append(f"  {note}")
    return "\n".join(result)


def status_cells(status: Status | None, now: float) -> list[str]:
    """Return the cells of a run after its name and its state."""
    if status is None:
        num_cells = len(COLUMNS) - 2
        return [NO_VALUE] * num_cells
    speed, remaining, loss, memory = NO_VALUE, NO_VALUE, NO_VALUE, NO_VALUE
    if status.steps_per_second:
        speed = f"{status.steps_per_second:.3g}"
    if status.remaining_seconds is not None:
        remaining = short_duration(status.remaining_seconds)
    if status.loss is not None:
        loss = f"{status.loss:.4f}"
    if status.gpu_gib is not None:
        memory = f"{status.gpu_gib:.1f}"
    age = short_duration(now - status.updated_at)
    step = f"{status.step}/{status.steps}"
    return [status.phase, step, speed, remaining, loss, memory, f"{age} ago"]


def note_of(run: RunStatus, now: float) -> str:
    """Return one line on a run that does not train; empty for others."""
    status = run.status
    if status is None:
        return "its status.json cannot be read"
    process = f"process {status.pid} on {status.host}"
    if run.condition == "dead":
        return (
            f"{process} has ended without a word in the phase `{status.phase}`. Its log may have the "
            "reason. Run the same command to resume"
        )
    if run.condition == "stalled":
        silence = short_duration(now - status.progress_at)
        return (
            f"{process} lives, and has done nothing for {silence}. Another process may hang, or the "
            "disk. Kill it, and run the same command to resume"
        )
    message = status.message.replace("\n  ", "; ")
    return one_line(message, MAX_MESSAGE)


def short_duration(seconds: float) -> str:
    """Return a duration in the largest unit that fits: 12s, 5m, 3.5h, 2.0d."""
    seconds = max(0.0, seconds)
    minutes = seconds / 60
    hours = minutes / 60
    days = hours / 24
    if seconds < 100:
        return f"{seconds:.0f}s"
    if minutes < 100:
        return f"{minutes:.0f}m"
    if hours < 48:
        return f"{hours:.1f}h"
    return f"{days:.1f}d"
