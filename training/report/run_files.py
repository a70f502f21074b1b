"""The files of a run, read for its report. Nothing but the files is needed, so that runs which have ended
can be read too."""

import time
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
        steps = [row["step"] for row in self.rows[-1:]]
        steps += [event["step"] for event in self.events[-1:]]
        return max(steps, default=0)


def adapter_name(options: dict[str, Any]) -> str:
    """Return export.name."""
    export = options.get("export")
    if isinstance(export, dict):
        return str(export.get("name", DEFAULT_NAME))
    return DEFAULT_NAME


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run. Those that are missing or not readable are left out."""
    options = read_options(folder)
    samples: dict[int, dict[int, Path]] = {}
    if (folder / SAMPLES_FOLDER).is_dir():
        samples = files_by_step(folder / SAMPLES_FOLDER, adapter_name(options))
    return RunFiles(
        folder=folder,
        options=options,
        rows=JsonLines(folder / METRICS_FILE).rows(),
        events=JsonLines(folder / EVENTS_FILE).rows(),
        facts=read_facts(folder),
        status=read_status(folder),
        samples=dict(sorted(samples.items())),
        read_at=time.time(),
    )


def read_options(folder: Path) -> dict[str, Any]:
    """Return the options in config.yaml; empty if it is not readable."""
    try:
        options = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return options if isinstance(options, dict) else {}
