"""events.jsonl: starts and ends of a run, and what it said while it trained."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from common.atomic import WriteError
from training.reporting.json_lines import JsonLines
from training.run_folder import EVENTS_FILE

EventKind = Literal["started", "resumed", "killed", "stopped", "failed", "finished", "message"]
ENDS = ("killed", "stopped", "failed", "finished")
"""Events after which a process of the run writes nothing more."""


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
        """Write an event. A full disk must not end the run."""
        if not self.is_main:
            return
        event: dict[str, object] = {
            "step": self.step,
            "time": time.time(),
            "kind": kind,
            "text": text,
        }
        if not self.is_open:
            self.waiting.append(event)
            return
        with suppress(WriteError):
            self.lines.append(event)

    def open(self, step: int, last_step: int, num_processes: int) -> None:
        """Write that the run starts at a step, and before this that an earlier process was killed, if
        nothing says how it ended. `last_step`: of this process."""
        if not self.is_main:
            return
        self.is_open = True
        earlier = self.lines.rows()
        start: EventKind = "started"
        if earlier:
            start = "resumed"
            last_event = earlier[-1]
            if last_event["kind"] not in ENDS:
                self.step = max(last_step, last_event["step"])
                self.add("killed")
        self.step = step
        self.add(start, f"processes: {num_processes}")
        waiting, self.waiting = self.waiting, []
        for event in waiting:
            with suppress(WriteError):
                self.lines.append({**event, "step": step})
