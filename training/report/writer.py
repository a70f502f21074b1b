"""Writes report.html while a run trains."""

import time
from pathlib import Path

from common.atomic import write_file
from training.report.page import run_page
from training.report.run_files import read_run
from training.report.sample_pictures import PictureCache
from training.run_folder import REPORT, is_run_folder

MIN_INTERVAL = 15.0
"""Seconds between two writes."""
MAX_SHARE = 0.01
"""Share of the time that may go into the report."""


class ReportWriter:
    """Writes the report of one run. It reads what the run has written, and keeps small pictures.

    An error must not end the run: it is kept in `error`, and the report stays as it was."""

    def __init__(self, folder: Path, is_main: bool):
        self.folder = folder
        self.is_main = is_main
        self.pictures = PictureCache()
        self.next_at = 0.0
        self.error: Exception | None = None
        self.is_error_told = False

    def write_if_due(self) -> None:
        """Write the report, unless this was done a moment ago."""
        if time.monotonic() >= self.next_at:
            self.write()

    def write(self) -> None:
        """Write the report now, if the run has begun."""
        if not self.is_main or not is_run_folder(self.folder):
            return
        started_at = time.monotonic()
        try:
            run = read_run(self.folder)
            page = run_page(run, self.pictures, self.folder)
            write_file(self.folder / REPORT, page)
        except Exception as error:  # a report is worth less than the run
            self.error = error
        now = time.monotonic()
        duration = now - started_at
        interval = max(MIN_INTERVAL, duration / MAX_SHARE)
        self.next_at = now + interval

    def untold_error(self) -> str:
        """Return why the report could not be written; empty if it could, or after the first call."""
        if self.error is None or self.is_error_told:
            return ""
        self.is_error_told = True
        return f"note: report.html could not be written: {type(self.error).__name__}: {self.error}"
