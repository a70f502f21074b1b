"""status.json: what a run is doing. It is rewritten while the run lives, so that others can tell whether
it does."""

import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import TypeAdapter

from common.atomic import WriteError, write_file
from common.errors import UserError
from training.run_folder import STATUS_FILE
from training.stopping.signals import RunStopped

State = Literal["running", "finished", "stopped", "failed"]
STOP_REPORT = ": RunStopped: "
"""In the report of a process that a signal has stopped."""
MISTAKE = 2
"""Exit code of a run that ends because of a mistake of the user."""
BEAT_EVERY = 10.0
"""Seconds between two writes of the file."""
MIN_INTERVAL = 1.0
"""Seconds that are always between two writes."""
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
    has_stepped: bool = False
    """True once this process has done a step."""
    trained_until: float | None = None
    """Time at which a process of the run last wrote the file while it trained."""

    @property
    def remaining_seconds(self) -> float | None:
        """Return an estimate of the time until the last step; None before there is a rate."""
        if self.state != "running" or not self.has_stepped or self.steps_per_second <= 0:
            return None
        return (self.steps - self.step) / self.steps_per_second


class StatusFile:
    """Writes status.json every BEAT_EVERY seconds in a thread. Processes other than the main one write
    nothing."""

    def __init__(self, folder: Path, steps: int, num_processes: int, is_main: bool):
        self.path, self.is_main = folder / STATUS_FILE, is_main
        self.earlier = read_status(folder)
        """The status that an earlier process of the run left."""
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
        if self.earlier is not None:  # until this process has its own numbers
            self.status = replace(
                self.status,
                steps_per_second=self.earlier.steps_per_second,
                loss=self.earlier.loss,
                gpu_gib=self.earlier.gpu_gib,
                trained_until=self.earlier.trained_until,
            )
        self.has_begun = False
        """True once the run writes its own files."""
        self.at_end: Callable[[State, str], None] | None = None
        """Called with the last state and its reason, after the file was written."""
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._has_changed = threading.Event()

    def begin(self, is_resumed: bool) -> None:
        """Say that the run begins to write its own files. A new run has no earlier numbers."""
        with self._lock:
            self.has_begun = True
            if not is_resumed:
                self.status = replace(self.status, loss=None, gpu_gib=None, steps_per_second=0.0)

    def set_phase(self, name: str) -> None:
        """Say what the run does from now on."""
        self._change(phase=name)
        self._has_changed.set()

    def set_encoded(self, noun: str, done: int, total: int) -> None:
        """Say how many captions or images of the main process are encoded."""
        self._change(phase=f"encode {noun} {done}/{total}")

    def set_first_step(self, step: int) -> None:
        """Say from which step the run trains."""
        self._change(step=step)

    def set_step(
        self, step: int, speed: float, loss: float | None = None, gpu_gib: float | None = None
    ) -> None:
        """Say which step is done. `speed`: steps per second. The last loss and memory stay if there
        are no new ones."""
        changes: dict[str, Any] = {"step": step, "steps_per_second": speed, "has_stepped": True}
        if loss is not None and math.isfinite(loss):  # JSON has no NaN
            changes["loss"] = loss
        if gpu_gib is not None:
            changes["gpu_gib"] = gpu_gib
        self._change(**changes)

    def _change(self, **changes: Any) -> None:
        """Change the status, unless the run is over: another thread may have ended it."""
        with self._lock:
            if not self._is_over.is_set():
                self.status = replace(self.status, progress_at=time.time(), **changes)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the file up to date in a block. Its last state is the way in which the block ends.

        After a mistake of the user that ends a run before it has begun, the file is as it was: the folder
        may hold a run that is finished."""
        if not self.is_main:
            yield
            return
        self._write()
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        try:
            yield
        except UserError as error:
            self.end("failed", str(error), is_mistake=True)
            raise
        except RunStopped as stopped:
            self.end("stopped", str(stopped))
            raise
        except BaseException as error:
            state: State = getattr(error, "run_state", "failed")
            self.end(state, f"{type(error).__name__}: {error}")
            raise
        else:
            self.end("finished", "")
        finally:
            self._is_over.set()
            self._has_changed.set()
            thread.join(BEAT_EVERY)

    def end(self, state: State, reason: str, is_mistake: bool = False) -> None:
        """Write the last state of the run. Only the first call counts.

        `is_mistake`: of the user. Before the run has begun, it leaves the file as it was."""
        with self._lock:
            if self._is_over.is_set() or not self.is_main:
                return
            self._is_over.set()
            phase = self.status.phase
            if state == "finished":
                phase = FINISHED
            message = reason[:MAX_MESSAGE]
            self.status = replace(self.status, state=state, phase=phase, message=message)
        if is_mistake and not self.has_begun:
            self._restore()
            return
        self._write()
        if self.at_end is not None:
            self.at_end(state, reason)

    def end_by_other(self, exit_code: int, report: str) -> None:
        """Write that another process has ended the run. `report`: of this process."""
        state: State = "stopped" if STOP_REPORT in report else "failed"
        self.end(state, report, is_mistake=exit_code == MISTAKE)

    def _restore(self) -> None:
        """Write the status that an earlier process left, or remove the file."""
        with suppress(WriteError, OSError):
            if self.earlier is None:
                self.path.unlink(missing_ok=True)
            else:
                write_file(self.path, as_json(self.earlier))

    def _beat(self) -> None:
        """Write the file every BEAT_EVERY seconds, and soon after the phase has changed."""
        while not self._is_over.wait(MIN_INTERVAL):
            self._has_changed.wait(BEAT_EVERY)
            self._has_changed.clear()
            with self._lock:
                if not self._is_over.is_set():
                    self._write()

    def _write(self) -> None:
        """Write the file. A full disk must not end the run."""
        now = time.time()
        status = replace(self.status, updated_at=now)
        if self.has_begun:
            status = replace(status, trained_until=now)
        with suppress(WriteError):
            write_file(self.path, as_json(status))


def as_json(status: Status) -> str:
    """Return the content of status.json."""
    return json.dumps(asdict(status), indent=1) + "\n"


def read_status(folder: Path) -> Status | None:
    """Return the status of the run in a folder; None if the file is missing or not readable."""
    try:
        content = (folder / STATUS_FILE).read_bytes()
        return TypeAdapter(Status).validate_json(content)
    except (OSError, ValueError):
        return None
