"""The options of runs, as a report shows them: without the paths of the computer."""

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

from common.text import is_private_path, public_value
from training.config import TrainConfig, to_dict
from training.report.run_files import RunFiles
from training.reporting.trackers import flatten


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
            changed[name] = option_text(value)
    return changed


def all_options(run: RunFiles) -> dict[str, str]:
    """Return all options of a run."""
    options = flatten(run.options)
    return {name: option_text(value) for name, value in options.items()}


def private_paths(run: RunFiles) -> list[str]:
    """Return the paths in the options of a run that its report does not show."""
    paths = []
    for value in flatten(run.options).values():
        text = str(value)
        if is_private_path(text):
            paths.append(text)
            paths.append(os.path.abspath(text))
    return paths


def option_text(value: Any) -> str:
    """Return the value of an option as a recipe has it, without the folders of paths."""
    if isinstance(value, bool):
        return str(value).lower()
    text = public_value(str(value))
    if text in ("None", "[]", "{}"):
        return ""
    return text


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
        different_values = set(values)
        if len(different_values) > 1:
            differences[name] = values
    return differences
