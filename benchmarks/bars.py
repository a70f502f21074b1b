"""Statements that a benchmark checks."""

from typing import NamedTuple


class Bar(NamedTuple):
    """A statement about the figures, and whether it is true."""

    text: str
    is_met: bool
    depends_on_time: bool
    """The figures are times, which mean nothing for a tiny model."""
