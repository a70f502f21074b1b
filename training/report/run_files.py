"""The files of a run, read for its report. Nothing but the files is needed, so that runs which have ended
can be read too."""

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training.report.facts_file import read_facts
from training.reporting.json_lines import JsonLines
from training.reporting.liveness import condition_of
from training.reporting.status import Status, read_status
from training.run_folder import (
    CONFIG_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    SAMPLES_FOLDER,
)
from training.sampling.overview import files_by_step

SECTIONS = ("model", "export", "tracking")
"""Sections of the options that a report reads."""
LAST_TIME = 1e11
"""Seconds since the epoch, thousands of years from now."""
LARGEST_NUMBER = 1e300
DEFAULT_NAME = "lora"
"""Default of export.name, for folders without a readable config."""


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run's files."""

    folder: Path
    options: dict[str, Any]
    """The options, as config.yaml has them."""
    rows: list[dict[str, Any]]
    """Metrics in the order of their steps."""
    events: list[dict[str, Any]]
    facts: dict[str, Any]
    status: Status | None
    samples: dict[int, dict[int, Path]]
    """Step -> number of the prompt -> image or video."""
    read_at: float
    """Seconds since the epoch."""

    @property
    def name(self) -> str:
        """Return the name of the run's folder."""
        return self.folder.resolve().name

    @property
    def adapter_name(self) -> str:
        return adapter_name(self.options)

    @property
    def condition(self) -> str:
        """Return whether the run lives, or how it ended."""
        if self.status is None:
            return "unknown"
        return condition_of(self.status, self.read_at)

    @property
    def last_step(self) -> int:
        """Return the last step that any file names."""
        last_rows = [*self.rows[-1:], *self.events[-1:]]
        steps = [row["step"] for row in last_rows]
        return max(steps, default=0)


def adapter_name(options: dict[str, Any]) -> str:
    """Return export.name."""
    export = options["export"]
    name = export.get("name", DEFAULT_NAME)
    path = Path(str(name))  # of a config from elsewhere, which must not leave the folder
    if not path.name:
        return DEFAULT_NAME
    return path.name


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run. What is missing, or not as a run writes it, is left out."""
    options = read_options(folder)
    samples: dict[int, dict[int, Path]] = {}
    samples_folder = folder / SAMPLES_FOLDER
    if samples_folder.is_dir():
        name = adapter_name(options)
        samples = files_by_step(samples_folder, name)
    metrics = JsonLines(folder / METRICS_FILE)
    events = JsonLines(folder / EVENTS_FILE)
    return RunFiles(
        folder=folder,
        options=options,
        rows=metric_rows(metrics.rows()),
        events=known_events(events.rows()),
        facts=read_facts(folder),
        status=read_status(folder),
        samples=dict(sorted(samples.items())),
        read_at=time.time(),
    )


def read_options(folder: Path) -> dict[str, Any]:
    """Return the options in config.yaml; without values if it is not readable. Sections are mappings."""
    path = folder / CONFIG_FILE
    options: Any = None
    with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        text = path.read_text(encoding="utf-8")
        options = yaml.safe_load(text)
    readable: dict[str, Any] = {}
    if isinstance(options, dict):
        readable = {str(name): value for name, value in options.items()}
    for section in SECTIONS:
        values = readable.get(section)
        if not isinstance(values, dict):
            readable[section] = {}
    return readable


def metric_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with their finite numbers only."""
    result = []
    for row in rows:
        numbers = {}
        for name, value in row.items():
            if is_number(value):
                numbers[name] = value
        if "step" in numbers:
            result.append(numbers)
    return result


def known_events(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that are events."""
    events = []
    for row in rows:
        seconds: Any = row.get("time")
        kind: Any = row.get("kind")
        is_event = isinstance(kind, str) and is_number(seconds) and is_number(row["step"])
        if not is_event:
            continue
        if 0 <= seconds < LAST_TIME:
            text = str(row.get("text", ""))
            event = {**row, "text": text}
            events.append(event)
    return events


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number that a chart can show."""
    is_numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return is_numeric and abs(value) < LARGEST_NUMBER
