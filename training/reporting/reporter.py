"""What a run has reported, as files of its own: a line of JSON per step. Trackers get the same rows."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from common.atomic import WriteError, write_file
from training.run_folder import METRICS, TRACKER


class JsonLines:
    """Rows with a `step` each, appended; what is past a step can be cut off."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, *rows: dict[str, Any]) -> None:
        """One write for all of `rows`: a reader, or a kill, sees whole lines."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.path.open("ab") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        except OSError as error:
            raise WriteError(self.path, error) from error

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows; the last one may have been cut off by a kill."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            with suppress(ValueError):  # of a kill, which the next sitting wrote on after
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    found.append(row)
        return found

    def cut(self, step: int) -> int:
        """Removes the rows past `step`; returns the step of the last row there was, or -1."""
        rows = self.rows()
        kept = [row for row in rows if row["step"] <= step]
        if rows or self.path.exists():
            write_file(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        return rows[-1]["step"] if rows else -1


class Reporter:
    """Rows of metrics, one per step, for metrics.jsonl, the tracker and the progress bar. Writes on the main process.

    A tracker cannot forget: rows that it has from before a kill are not sent again. They are the same but for times
    and for the span of a mean that a wish to save has cut.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, tracker_id: str):
        self.accelerator, self.folder = accelerator, folder
        self.lines = JsonLines(folder / METRICS)
        self.row: dict[str, float] = {}
        self.sent = -1
        self.tracker_id = tracker_id
        self.progress: tqdm | None = None

    def resume(self, step: int, row: dict[str, float]) -> None:
        """Goes on after `step`, whose row, if it was not finished, is `row`. Called on all ranks."""
        self.row = dict(row)
        if not self.accelerator.is_main_process:
            return
        with suppress(OSError, ValueError, KeyError, TypeError):
            about = json.loads((self.folder / TRACKER).read_text(encoding="utf-8"))
            self.tracker_id, self.sent = str(about["id"]), int(about["sent"])
        self.sent = max(self.sent, self.lines.cut(step if not row else step - 1))
        write_file(self.folder / TRACKER, json.dumps({"id": self.tracker_id, "sent": self.sent}))

    def bar(self, steps: int, step: int) -> None:
        """Shows the progress bar."""
        hidden = not self.accelerator.is_main_process
        self.progress = tqdm(total=steps, initial=step, unit="step", disable=hidden)

    def emit(self, step: int) -> None:
        """Sends the row of `step`, if there is anything in it."""
        row, self.row = self.row, {}
        if not row or not self.accelerator.is_main_process:
            return
        self.lines.append({"step": step, **row})
        if step > self.sent:
            self.accelerator.log(row, step=step)
            self.sent = step

    def advance(self) -> None:
        if self.progress is not None:
            self.progress.update()

    def show(self, **values: str) -> None:
        """Values beside the progress bar."""
        if self.progress is not None:
            self.progress.set_postfix(values)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()

    def say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(message)

    @property
    def speed(self) -> float:
        """Steps per second of this sitting, as the progress bar has it."""
        return (self.progress.format_dict["rate"] or 0.0) if self.progress is not None else 0.0
