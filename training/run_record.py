"""The files for those who watch a run: status.json, events.jsonl and report.html."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.atomic import WriteError, write_file
from data.precompute.build import DataPlan, DatasetBuilder, Datasets
from training.report.data_pictures import NO_PICTURES, DataPictures, data_pictures
from training.report.facts_file import read_facts
from training.report.writer import ReportWriter
from training.reporting.events import EventLog, Killed
from training.reporting.status import State, StatusFile
from training.run_folder import FACTS_FILE


class RunRecord:
    """Keeps the files about a run up to date. Processes other than the main one write nothing."""

    def __init__(self, folder: Path, steps: int, num_processes: int, is_main: bool):
        self.folder = folder
        self.is_main = is_main
        self.num_processes = num_processes
        self.status = StatusFile(folder, steps, num_processes, is_main)
        self.events = EventLog(folder, is_main)
        self.report = ReportWriter(folder, is_main)
        self.data = NO_PICTURES
        """Pictures of the data, for the report and for measures of samples."""

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the files up to date in a block, and write how it ended."""
        self.status.at_end = self._note_end
        with self.status.kept():
            yield

    def say(self, message: str) -> None:
        """Print a message on the main process, without breaking a progress bar, and keep it."""
        self.print(message)
        self.events.add("message", message)

    def print(self, message: str) -> None:
        """Print a message on the main process, without breaking a progress bar."""
        if self.is_main:
            tqdm.write(message)

    def start_steps(
        self,
        step: int,
        last_step: int,
        previous_steps: int,
        is_resumed: bool,
    ) -> None:
        """Write that the run trains from a step on. `last_step`: the last one that an earlier process
        reported. Both count the `previous_steps` of an existing adapter."""
        killed: Killed | None = None
        earlier = self.status.earlier
        if earlier is not None and earlier.trained_until is not None:
            total_step = previous_steps + earlier.step
            killed_step = max(last_step, total_step)
            killed = Killed(killed_step, earlier.trained_until)
        self.status.begin(is_resumed)
        self.events.open(step, self.num_processes, killed)

    def add_pictures(
        self, builder: DatasetBuilder, plan: DataPlan, datasets: Datasets, max_compared: int
    ) -> None:
        """Read small pictures of the data, unless an earlier process of the run did.

        `max_compared`: largest number of training images with which samples are compared."""
        if not self.is_main:
            return
        facts = read_facts(self.folder)
        if facts and facts["dataset"] == datasets.train.content_hash:
            self.data = DataPictures(facts["pictures"], facts["small_images"])
        has_compared = bool(self.data.small_images)
        if self.data.pictures and (has_compared or not max_compared):
            return
        try:
            self.data = data_pictures(builder, plan, max_compared)
        except Exception as error:  # pictures are worth less than the run
            self.say(f"note: the report has no pictures of the data: {error}")

    def write_facts(self, facts: dict[str, Any]) -> None:
        """Write what the report shows and no other file has. A full disk must not end the run."""
        with suppress(WriteError):
            write_file(self.folder / FACTS_FILE, json.dumps(facts))

    def _note_end(self, state: State, reason: str) -> None:
        if not self.events.is_open or state == "running":
            return
        self.events.add(state, reason)
        self.report.write()
        error_text = self.report.untold_error()
        if error_text:
            self.print(error_text)
