"""Changes of options: applied to a config, and as text for the command line. Imports no torch."""

from dataclasses import replace
from typing import Any

from training.config import TrainConfig

Changes = dict[str, Any]
"""Option, as on the command line without dashes -> its new value."""


def changed_config(config: TrainConfig, changes: Changes) -> TrainConfig:
    """Return a config with changed options."""
    for name, value in changes.items():
        section_name, _, field = name.rpartition(".")
        if section_name:
            section = replace(getattr(config, section_name), **{field: value})
            config = replace(config, **{section_name: section})
        else:
            config = replace(config, **{field: value})
    return config


def as_options(changes: Changes) -> str:
    """Return changes in the form of the command line."""
    return " ".join(as_option(name, value) for name, value in changes.items())


def as_option(name: str, value: object) -> str:
    """Return an option in the form of the command line."""
    if value is True:
        return f"--{name}"
    if value is not False:
        return f"--{name} {value}"
    section, _, field = name.rpartition(".")
    if not section:
        return f"--no_{field}"
    return f"--{section}.no_{field}"
