"""Metrics of a run: metrics.jsonl, the progress bar, and the tracker, which gets the same rows."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from common.atomic import write_file
from training.reporting.json_lines import JsonLines
from training.run_folder import METRICS_FILE, TRACKER_FILE


class Reporter:
    """Reports one row of metrics per step, and messages. Writes on the main process only.

    A tracker cannot delete rows, so rows that it received before a kill are not sent again. They
    are the same except for times, and for means whose span was cut by a request to save.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        tracker_id: str,
        say: Callable[[str], None],
    ):
        """`say`: prints a message on the main process, without breaking the progress bar."""
        self.accelerator, self.folder = accelerator, folder
        self.say = say
        self.lines = JsonLines(folder / METRICS_FILE)
        self.row: dict[str, float] = {}
        """Metrics of the current step that were not reported yet."""
        self.sent_step = -1
        self.own_sent_step = -1
        """The last step whose rows this process has sent. A step may have several."""
        self.tracker_id = tracker_id
        self.progress: tqdm | None = None

    def resume(self, step: int, row: dict[str, float]) -> int:
        """Continue after `step`; return the last step that an earlier process reported, or -1.

        `row`: metrics of this step that were not reported. Called on all processes."""
        self.row = dict(row)
        if not self.accelerator.is_main_process:
            return -1
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
        return last_written_step

    def show_progress(self, steps: int, step: int) -> None:
        """Show the progress bar."""
        is_hidden = not self.accelerator.is_main_process
        self.progress = tqdm(total=steps, initial=step, unit="step", disable=is_hidden)

    def emit(self, step: int) -> None:
        """Write and send the row of `step`, unless it is empty."""
        row = self.row
        self.row = {}
        if not row or not self.accelerator.is_main_process:
            return
        self.lines.append({"step": step, **row})
        if step > self.sent_step or step == self.own_sent_step:
            self.accelerator.log(row, step=step)
            self.sent_step = step
            self.own_sent_step = step

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

    @property
    def speed(self) -> float:
        """Steps per second since the run was started or resumed."""
        if self.progress is None:
            return 0.0
        return self.progress.format_dict["rate"] or 0.0
