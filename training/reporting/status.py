"""status.json: what a run is doing. It is rewritten while the run lives, so that others can tell whether
it does."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import psutil

from common.atomic import WriteError, write_file
from common.errors import UserError
from training.run_folder import STATUS_FILE
from training.stopping.signals import RunStopped

State = Literal["running", "finished", "stopped", "failed"]
BEAT_EVERY = 10.0
"""Seconds between two writes of the file."""
MAX_MESSAGE = 500
"""Characters of an error that the file holds."""
STARTING, LOADING, EXPORTING, FINISHED = "start", "load", "write files", "finished"
"""Names of what a run does outside of the phases of its memory plan."""


@dataclass(frozen=True)
class Status:
    """State, progress and process of a run. Times are seconds since the epoch."""

    state: State
    phase: str
    step: int
    steps: int
    steps_per_second: float
    loss: float | None
    """Mean training loss since the log before the last one."""
    gpu_gib: float | None
    """Peak memory of the main process on its GPU so far."""
    message: str
    """Reason for which the run ended, unless it finished."""
    num_processes: int
    pid: int
    """Number of the main process on its host."""
    pid_started_at: float
    """Time at which this process started. It tells whether another process has its number."""
    host: str
    started_at: float
    progress_at: float
    """Time of the last step, or of the last change of the phase."""
    updated_at: float
    """Time at which the file was written."""

    @property
    def remaining_seconds(self) -> float | None:
        """Return an estimate of the time until the last step; None before there is a rate."""
        if self.state != "running" or self.steps_per_second <= 0:
            return None
        return (self.steps - self.step) / self.steps_per_second


class StatusFile:
    """Writes status.json every BEAT_EVERY seconds in a thread. Processes other than the main one write
    nothing."""

    def __init__(self, folder: Path, steps: int, num_processes: int, is_main: bool):
        self.path, self.is_main = folder / STATUS_FILE, is_main
        now = time.time()
        process = psutil.Process()
        self.status = Status(
            state="running",
            phase=STARTING,
            step=0,
            steps=steps,
            steps_per_second=0.0,
            loss=None,
            gpu_gib=None,
            message="",
            num_processes=num_processes,
            pid=os.getpid(),
            pid_started_at=process.create_time(),
            host=socket.gethostname(),
            started_at=now,
            progress_at=now,
            updated_at=now,
        )
        self.at_end: Callable[[State, str], None] | None = None
        """Called with the last state and its reason, after the file was written."""
        self._lock = threading.Lock()
        self._is_over = threading.Event()

    def set_phase(self, name: str) -> None:
        """Say what the run does from now on."""
        self.status = replace(self.status, phase=name, progress_at=time.time())

    def set_step(
        self, step: int, speed: float, loss: float | None = None, gpu_gib: float | None = None
    ) -> None:
        """Say which step is done. `speed`: steps per second. The last loss and memory stay if there
        are no new ones."""
        status = self.status
        if loss is None:
            loss = status.loss
        if gpu_gib is None:
            gpu_gib = status.gpu_gib
        self.status = replace(
            status,
            step=step,
            steps_per_second=speed,
            loss=loss,
            gpu_gib=gpu_gib,
            progress_at=time.time(),
        )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the file up to date in a block. Its last state is the way in which the block ends.

        After a mistake of the user, which ends a run before it has written anything, the file is
        removed."""
        if not self.is_main:
            yield
            return
        self._write()
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        try:
            yield
        except UserError as error:
            self.end("failed", str(error))
            self.path.unlink(missing_ok=True)
            raise
        except RunStopped as stopped:
            self.end("stopped", str(stopped))
            raise
        except BaseException as error:
            self.end("failed", f"{type(error).__name__}: {error}")
            raise
        else:
            self.end("finished", "")
        finally:
            self._is_over.set()
            thread.join(BEAT_EVERY)

    def end(self, state: State, reason: str) -> None:
        """Write the last state of the run. Only the first call counts."""
        with self._lock:
            if self._is_over.is_set() or not self.is_main:
                return
            self._is_over.set()
        phase = FINISHED if state == "finished" else self.status.phase
        self.status = replace(self.status, state=state, phase=phase, message=reason[:MAX_MESSAGE])
        self._write()
        if self.at_end is not None:
            self.at_end(state, reason)

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_EVERY):
            with self._lock:
                if not self._is_over.is_set():
                    self._write()

    def _write(self) -> None:
        """Write the file. A full disk must not end the run."""
        status = replace(self.status, updated_at=time.time())
        with suppress(WriteError):
            write_file(self.path, json.dumps(asdict(status), indent=1) + "\n")


def read_status(folder: Path) -> Status | None:
    """Return the status of the run in a folder; None if the file is missing or not readable."""
    try:
        values = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
        status_values = {item.name: values[item.name] for item in fields(Status)}
        return Status(**status_values)
    except (OSError, ValueError, KeyError, TypeError):
        return None
