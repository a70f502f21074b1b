"""events.jsonl: starts and ends of a run, and what it said while it trained."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from common.atomic import WriteError
from training.reporting.json_lines import JsonLines
from training.run_folder import EVENTS_FILE

EventKind = Literal["started", "resumed", "killed", "stopped", "failed", "finished", "message"]
ENDS = ("killed", "stopped", "failed", "finished")
"""Events after which a process of the run writes nothing more."""


class Killed(NamedTuple):
    """The end of a process that was killed."""

    step: int
    time: float
    """Seconds since the epoch at which it last wrote."""


class EventLog:
    """Writes events on the main process. Those before `open` are kept until then: an older run may have
    left its files in the folder."""

    def __init__(self, folder: Path, is_main: bool):
        self.lines = JsonLines(folder / EVENTS_FILE)
        self.is_main = is_main
        self.is_open = False
        self.step = 0
        """The last step that is done, with the steps of an existing adapter."""
        self.waiting: list[dict[str, object]] = []

    def add(self, kind: EventKind, text: str = "") -> None:
        """Write an event at the current step."""
        if self.is_main:
            self._write(kind, self.step, time.time(), text)

    def open(self, step: int, num_processes: int, killed: Killed | None) -> None:
        """Write that the run starts at a step, and before this that an earlier process was killed, if
        nothing says how it ended. `killed`: what is known of its end."""
        if not self.is_main:
            return
        self.is_open = True
        earlier = self.lines.rows()
        start: EventKind = "started"
        if earlier:
            start = "resumed"
            last_event = earlier[-1]
            was_killed = last_event.get("kind") not in ENDS
            if was_killed and killed is not None:
                self._write("killed", killed.step, killed.time)
        for event in self.waiting:
            moved_event = {**event, "step": step}
            with suppress(WriteError):
                self.lines.append(moved_event)
        self.waiting = []
        self.step = step
        self.add(start, f"step {step}, processes: {num_processes}")

    def _write(self, kind: EventKind, step: int, seconds: float, text: str = "") -> None:
        """Write an event, or keep it until `open`. A full disk must not end the run."""
        event: dict[str, object] = {
            "step": step,
            "time": seconds,
            "kind": kind,
            "text": text,
        }
        if not self.is_open:
            self.waiting.append(event)
            return
        with suppress(WriteError):
            self.lines.append(event)
