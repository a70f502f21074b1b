"""Signals that ask a run to save, to stop, or both. Imports no torch, so that handlers exist before
it loads.

A handler only records the request, so that signals may arrive at any time and any number of times:
under torchrun a process gets one SIGTERM two to four times. While there is nothing to save (before
the first step, after the last checkpoint) a handler raises RunStopped at once. Inside `deferred`
the training loop reads the request instead, and decides together with the other processes.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

REPEAT_AFTER = 2.0
"""Seconds after which a Ctrl-C counts as a second one; launchers pass on the one that the terminal
sent."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h
SIGNAL_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")
# Windows has no SIGUSR1
SIGNALS = tuple(getattr(signal, name) for name in SIGNAL_NAMES if hasattr(signal, name))


class StopRequest(IntEnum):
    """A request to a run; of several, the largest one counts."""

    NONE = 0
    SAVE = 1
    REQUEUE = 2
    """Save, stop, and let SLURM start the job again."""
    TERMINATE = 3
    INTERRUPT = 4

    @property
    def stops(self) -> bool:
        return self > StopRequest.SAVE


SENDERS = {
    StopRequest.REQUEUE: "SIGUSR1",
    StopRequest.TERMINATE: "SIGTERM",
    StopRequest.INTERRUPT: "SIGINT",
}
EXIT_CODES = {
    StopRequest.REQUEUE: 0,
    StopRequest.TERMINATE: 128 + signal.SIGTERM,
    StopRequest.INTERRUPT: 128 + signal.SIGINT,
}


class RunStopped(SystemExit):
    """The run stops after a request; the exit code says which one."""

    def __init__(self, request: StopRequest, outcome: str, is_agreed: bool = False):
        """`outcome`: what was saved. `is_agreed`: all processes stop, and each of them knows it."""
        super().__init__(EXIT_CODES[request])
        self.code: int = EXIT_CODES[request]
        self.request, self.outcome, self.is_agreed = request, outcome, is_agreed
        self.is_reported = False
        self.is_first: bool | None = None
        """True if this process reports for all, because the processes are not connected yet."""

    def __str__(self) -> str:
        return f"{SENDERS[self.request]}: {self.outcome}. Run the same command to resume"


class SignalHandler:
    """Records the requests that signals make to this process."""

    def __init__(self) -> None:
        self.request = StopRequest.NONE
        self.is_deferred = False
        self.outcome = "stopped before the first step"
        self.interrupted_at: float | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle signals in this block; restore the earlier handlers after it."""
        earlier_handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in earlier_handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record signals in this block: the training loop, which answers them itself."""
        self.is_deferred = True
        yield  # not in `finally`: after an error signals are of no use
        self.is_deferred = False
        self.outcome = "stopped after the last step, before all files were written"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Answer signals at the end of this block: an interrupted import leaves a broken module."""
        self.is_deferred = True
        yield
        self.is_deferred = False
        self._stop_if_asked()

    def ignore_signals(self) -> None:
        """Ignore signals from here on, because nothing more is saved."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def take_request(self) -> StopRequest:
        """Return the pending request, and clear it if it was SAVE."""
        request = self.request
        if request is StopRequest.SAVE:
            self.request = StopRequest.NONE
        return request

    def _handle(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            self._leave_at_once_if_repeated()
        self.request = max(self.request, request_of(number))
        if not self.is_deferred:
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.request.stops:
            # launchers repeat signals, and the cleanup must not be interrupted
            self.is_deferred = True
            raise RunStopped(self.request, self.outcome)

    def _leave_at_once_if_repeated(self) -> None:
        now = time.monotonic()
        if self.interrupted_at is not None and now - self.interrupted_at > REPEAT_AFTER:
            os._exit(EXIT_CODES[StopRequest.INTERRUPT])
        self.interrupted_at = self.interrupted_at or now


def request_of(number: int) -> StopRequest:
    """Return the request that a signal means. Under SLURM, SIGUSR1 warns that the job's time is
    nearly up."""
    if number == signal.SIGINT:
        return StopRequest.INTERRUPT
    if number == signal.SIGTERM:
        return StopRequest.TERMINATE
    if os.environ.get("SLURM_JOB_ID"):
        return StopRequest.REQUEUE
    return StopRequest.SAVE


def requeue_job() -> str:
    """Ask SLURM to start this job again; return the outcome as a sentence."""
    job, scontrol = os.environ["SLURM_JOB_ID"], shutil.which("scontrol")
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # the id of one task may be the id of the whole array
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if scontrol is None:
        return f"job {job} was not requeued: there is no scontrol on this node"
    result = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return f"job {job} is requeued"
    reason = result.stderr.strip() or f"scontrol ended with exit code {result.returncode}"
    return f"job {job} was not requeued: {reason}"


def report_stop(stopped: RunStopped, rank: int) -> None:
    """Print why the run stopped, once and in one process.

    Requeues the job of a run that stopped before its processes agreed on it."""
    is_first = rank == 0 if stopped.is_first is None else stopped.is_first
    if stopped.is_reported or not is_first:
        return
    stopped.is_reported = True
    if stopped.request is StopRequest.REQUEUE and not stopped.is_agreed:
        stopped.outcome += f"; {requeue_job()}"
    print(f"stopped by {stopped}", flush=True)


def end_with_launcher() -> None:
    """Let the kernel send SIGTERM when the launcher ends, even by SIGKILL.

    No other process would stop this one, and it would continue next to the following run."""
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if is_launched and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
