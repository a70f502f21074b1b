"""Signals: what asks a run to save, to leave, or both. No torch here: the handlers are there before it loads.

A handler only notes the signal, so that it may come at any moment, any number of times: under torchrun a rank gets one
SIGTERM two to four times. While nothing can be lost (before the first step, after the last checkpoint) it raises
Stopped at once; inside `deferred` the loop asks for what was noted and decides together with the other ranks.
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

AGAIN = 2.0  # seconds: a launcher passes the Ctrl-C on that its ranks got from the terminal too
PR_SET_PDEATHSIG = 1  # linux/prctl.h
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Asked(IntEnum):
    """What a run was asked to do, the strongest last."""

    NOTHING = 0
    SAVE = 1
    REQUEUE = 2
    """Save, leave, and be started again by SLURM."""
    TERMINATE = 3
    INTERRUPT = 4

    @property
    def leaves(self) -> bool:
        return self > Asked.SAVE


NAMES = {Asked.REQUEUE: "SIGUSR1", Asked.TERMINATE: "SIGTERM", Asked.INTERRUPT: "SIGINT"}
STATUS = {Asked.REQUEUE: 0, Asked.TERMINATE: 128 + signal.SIGTERM, Asked.INTERRUPT: 128 + signal.SIGINT}


class Stopped(SystemExit):
    """The run leaves because it was asked to, with the exit status that says so."""

    def __init__(self, asked: Asked, done: str, agreed: bool = False):
        """`agreed`: all ranks leave, and know it."""
        super().__init__(STATUS[asked])
        self.asked, self.done, self.agreed = asked, done, agreed
        self.is_first: bool | None = None
        """Of ranks that do not know of each other yet, the one that speaks for all."""

    def __str__(self) -> str:
        return f"{NAMES[self.asked]}: {self.done}; the same command goes on from there"


class Interruptions:
    """What the signals of this process ask for."""

    def __init__(self) -> None:
        self.asked = Asked.NOTHING
        self.waits = False
        self.place = "left before the first step"
        self.interrupted_at: float | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Signals are handled here; afterwards as before."""
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals are noted here for the one who asks. For the loop, after which nothing is left to be saved."""
        self.waits = True
        yield  # after an error no signal is of use any more: it stays like this
        self.waits = False
        self.place = "left before all files were written, after the last step"

    def ignored(self) -> None:
        """Nothing is to be saved any more: signals are of no use from here on."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def take(self) -> Asked:
        """What was asked for. A wish to save is forgotten then: another signal is another wish."""
        asked = self.asked
        if asked is Asked.SAVE:
            self.asked = Asked.NOTHING
        return asked

    def _handle(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted_at is not None and now - self.interrupted_at > AGAIN:
                os._exit(STATUS[Asked.INTERRUPT])
            self.interrupted_at = self.interrupted_at or now
        self.asked = max(self.asked, asked_by(number))
        if self.asked.leaves and not self.waits:
            self.waits = True  # a launcher repeats itself, and what is being left must not be cut off
            raise Stopped(self.asked, self.place)


def asked_by(number: int) -> Asked:
    """SIGUSR1 is SLURM's warning that the time is nearly up, where there is SLURM."""
    if number == signal.SIGUSR1:
        return Asked.REQUEUE if os.environ.get("SLURM_JOB_ID") else Asked.SAVE
    return Asked.INTERRUPT if number == signal.SIGINT else Asked.TERMINATE


def requeue() -> str:
    """Has SLURM start this job again; returns what became of it."""
    job, scontrol = os.environ["SLURM_JOB_ID"], shutil.which("scontrol")
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # the id of one of an array's tasks is the whole array's too
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if scontrol is None:
        return f"job {job} was not requeued: there is no scontrol on this node"
    done = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True, check=False)
    fault = done.stderr.strip() or f"scontrol ended with {done.returncode}"
    return f"job {job} is requeued" if done.returncode == 0 else f"job {job} was not requeued: {fault}"


def end_with_launcher() -> None:
    """Has the kernel send SIGTERM when the launcher is gone, by SIGKILL too: no one would stop this process any more,
    and it would go on beside the next run."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
