"""Metrics of a run: metrics.jsonl, the progress bar, and the tracker, which gets the same rows."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from common.atomic import WriteError, write_file
from training.run_folder import METRICS_FILE, TRACKER_FILE


class JsonLines:
    """A file of JSON rows with a `step` each."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, *rows: dict[str, Any]) -> None:
        """Append rows in one write, so that readers and kills see whole lines."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = json_lines(rows).encode()
        try:
            with self.path.open("ab") as file:
                file.write(data)
        except OSError as error:
            raise WriteError(self.path, error) from error

    def rows(self) -> list[dict[str, Any]]:
        """Return all complete rows. A kill may have cut off the last one."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        *complete_lines, _ = text.split("\n")
        rows = []
        for line in complete_lines:
            try:
                row = json.loads(line)
            except ValueError:  # a line that a kill cut off and the resumed run continued
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return rows

    def truncate(self, step: int) -> int:
        """Remove the rows after `step`; return the step of the last row that the file had, or -1."""
        if not self.path.exists():
            return -1
        rows = self.rows()
        remaining_rows = [row for row in rows if row["step"] <= step]
        write_file(self.path, json_lines(remaining_rows))
        if not rows:
            return -1
        return rows[-1]["step"]


def json_lines(rows: Iterable[dict[str, Any]]) -> str:
    """Return rows as lines of JSON."""
    lines = [json.dumps(row) + "\n" for row in rows]
    return "".join(lines)


class Reporter:
    """Reports one row of metrics per step, and messages. Writes on the main process only.

    A tracker cannot delete rows, so rows that it received before a kill are not sent again. They
    are the same except for times, and for means whose span was cut by a request to save.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, tracker_id: str):
        self.accelerator, self.folder = accelerator, folder
        self.lines = JsonLines(folder / METRICS_FILE)
        self.row: dict[str, float] = {}
        """Metrics of the current step that were not reported yet."""
        self.sent_step = -1
        self.tracker_id = tracker_id
        self.progress: tqdm | None = None

    def resume(self, step: int, row: dict[str, float]) -> None:
        """Continue after `step`. `row`: metrics of this step that were not reported. Called on all
        processes."""
        self.row = dict(row)
        if not self.accelerator.is_main_process:
            return
        tracker_path = self.folder / TRACKER_FILE
        with suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads(tracker_path.read_text(encoding="utf-8"))
            self.tracker_id = str(saved["id"])
            self.sent_step = int(saved["sent"])
        last_complete_step = step
        if row:
            last_complete_step = step - 1
        last_written_step = self.lines.truncate(last_complete_step)
        self.sent_step = max(self.sent_step, last_written_step)
        saved = {"id": self.tracker_id, "sent": self.sent_step}
        write_file(tracker_path, json.dumps(saved))

    def show_progress(self, steps: int, step: int) -> None:
        """Show the progress bar."""
        is_hidden = not self.accelerator.is_main_process
        self.progress = tqdm(total=steps, initial=step, unit="step", disable=is_hidden)

    def emit(self, step: int) -> None:
        """Write and send the row of `step`, unless it is empty."""
        row, self.row = self.row, {}
        if not row or not self.accelerator.is_main_process:
            return
        self.lines.append({"step": step, **row})
        if step > self.sent_step:
            self.accelerator.log(row, step=step)
            self.sent_step = step

    def advance(self) -> None:
        """Advance the progress bar by a step."""
        if self.progress is not None:
            self.progress.update()

    def leave_out(self, seconds: float) -> None:
        """Do not count seconds, which went into drawing, in the speed of the training."""
        if self.progress is not None and not self.progress.disable:  # else it has no times
            self.progress.start_t += seconds
            self.progress.last_print_t += seconds

    def show(self, **values: str) -> None:
        """Show values at the progress bar."""
        if self.progress is not None:
            self.progress.set_postfix(values)

    def close(self) -> None:
        """Close the progress bar."""
        if self.progress is not None:
            self.progress.close()

    def say(self, message: str) -> None:
        """Print a message on the main process, without breaking the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(message)

    @property
    def speed(self) -> float:
        """Steps per second since the run was started or resumed."""
        if self.progress is None:
            return 0.0
        return self.progress.format_dict["rate"] or 0.0
