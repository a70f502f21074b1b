"""The options of runs, as a report shows them: without the paths of the computer."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from training.config import TrainConfig, to_dict
from training.report.run_files import RunFiles
from training.reporting.trackers import flatten

FOLDERS = re.compile(r"(?:file://|(?<![\w.:/~-]))(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\",:;]+[/\\])+")
"""Folders of an absolute path in a text."""
HIDDEN = ".../"


def public_text(text: str) -> str:
    """Return a text in which absolute paths are only the names of their files.

    A report is sent to others, whom user names and folders do not concern."""
    path = Path(text)
    if path.is_absolute():  # it may contain spaces
        return HIDDEN + path.name
    return FOLDERS.sub(HIDDEN, text)


@cache
def default_options() -> dict[str, Any]:
    """Return the default of each option."""
    return flatten(to_dict(TrainConfig()))


def changed_options(run: RunFiles) -> dict[str, str]:
    """Return the options that are not the defaults."""
    defaults = default_options()
    options = flatten(run.options)
    changed = {}
    for name, value in options.items():
        if value != defaults.get(name):
            text = str(value)
            changed[name] = public_text(text)
    return changed


def all_options(run: RunFiles) -> dict[str, str]:
    """Return all options of a run."""
    options = flatten(run.options)
    return {name: public_text(str(value)) for name, value in options.items()}


def option_differences(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Return the options in which runs differ, with the value of each run."""
    options = [all_options(run) for run in runs]
    names: dict[str, None] = {}
    for run_options in options:
        names.update(dict.fromkeys(run_options))
    names.pop("output_dir", None)
    differences = {}
    for name in names:
        values = [run_options.get(name, "-") for run_options in options]
        if len(set(values)) > 1:
            differences[name] = values
    return differences
