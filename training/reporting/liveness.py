"""Judges by the status.json of a run whether the run lives."""

import socket
import time
from typing import Literal

import psutil

from training.memory.phase_memory import TRAINING
from training.reporting.status import BEAT_EVERY, Status

Condition = Literal["running", "stalled", "dead", "finished", "stopped", "failed"]
SILENT_AFTER = 6 * BEAT_EVERY
"""Seconds without a new status.json after which a run on another computer counts as dead."""
STALLED_AFTER = 120.0
"""Seconds without progress in training after which a run is stalled, at least."""
MAX_CLOCK_ERROR = 2.0
"""Seconds between two readings of the time at which a process started."""
STALLED_STEPS = 20
"""Number of steps that would have fit into the time without progress, at least."""


def condition_of(status: Status, now: float | None = None) -> Condition:
    """Return what a run's status means. `now`: seconds since the epoch; None: now.

    A run that says "running" is dead if its process is gone, or if it is silent. It is stalled if its
    process lives and trains no step, for example because another process hangs."""
    if now is None:
        now = time.time()
    if status.state != "running":
        return status.state
    is_silent = now - status.updated_at > SILENT_AFTER
    if status.host != socket.gethostname():
        if is_silent:
            return "dead"
    elif not is_alive(status, is_silent):
        return "dead"
    elif is_silent:
        return "stalled"
    if status.phase == TRAINING and now - status.progress_at > patience(status):
        return "stalled"
    return "running"


def patience(status: Status) -> float:
    """Return the seconds without a step that are normal in this run."""
    if not status.has_stepped or status.steps_per_second <= 0:
        return 10 * STALLED_AFTER  # the first step compiles
    return max(STALLED_AFTER, STALLED_STEPS / status.steps_per_second)


def is_alive(status: Status, is_silent: bool) -> bool:
    """Return whether the process of a status lives on this computer.

    `is_silent`: whether it has not written for a while. A number may belong to another process by now;
    the time at which it started tells, unless the clock was set."""
    try:
        process = psutil.Process(status.pid)
        difference = abs(process.create_time() - status.pid_started_at)
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError):
        return False
    is_same = difference < MAX_CLOCK_ERROR or not is_silent
    return is_same and not is_zombie
