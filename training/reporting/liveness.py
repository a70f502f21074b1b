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
    if status.host == socket.gethostname():
        if not is_alive(status):
            return "dead"
        if now - status.updated_at > SILENT_AFTER:
            return "stalled"
    elif now - status.updated_at > SILENT_AFTER:
        return "dead"
    if status.phase == TRAINING and now - status.progress_at > patience(status):
        return "stalled"
    return "running"


def patience(status: Status) -> float:
    """Return the seconds without a step that are normal in this run."""
    if status.steps_per_second <= 0:
        return 10 * STALLED_AFTER  # the first step compiles
    return max(STALLED_AFTER, STALLED_STEPS / status.steps_per_second)


def is_alive(status: Status) -> bool:
    """Return whether the process of a status lives on this computer."""
    try:
        process = psutil.Process(status.pid)
        started_at = process.create_time()
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
    return not is_zombie and abs(started_at - status.pid_started_at) < 2
