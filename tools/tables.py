"""Tables that sub-commands print: one line per block of the model, and one for all."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tools.unknown_model import block_of


@dataclass
class Row:
    """What is known of the layers of one block."""

    layers: int = 0
    words: dict[str, set] = field(default_factory=dict)
    squares: float = 0.0
    error_squares: float = 0.0

    def add(self, words: Mapping[str, object], norm: float, error: float) -> None:
        """`words`: column -> what a layer has there; `norm` of its update; `error`: of the update,
        relative."""
        self.layers += 1
        for column, word in words.items():
            self.words.setdefault(column, set()).add(word)
        self.squares += norm**2
        self.error_squares += (norm * error) ** 2

    @property
    def norm(self) -> float:
        return math.sqrt(self.squares)

    @property
    def error(self) -> float:
        return math.sqrt(self.error_squares / self.squares) if self.squares else 0.0


@dataclass
class Report:
    """The layers of an adapter, summed up by block."""

    with_error: bool = True
    rows: dict[str, Row] = field(default_factory=dict)
    total: Row = field(default_factory=Row)

    def add(self, layer: str, words: Mapping[str, object], norm: float, error: float = 0.0) -> None:
        for row in (self.rows.setdefault(block_of(layer), Row()), self.total):
            row.add(words, norm, error)

    def __str__(self) -> str:
        columns = list(dict.fromkeys(column for row in self.rows.values() for column in row.words))
        lines = [["block", "layers", *columns, "|dW|", *(["error"] if self.with_error else [])]]
        for name, row in [*self.rows.items(), ("all", self.total)]:
            cells = [
                name,
                str(row.layers),
                *(span(row.words.get(column, ())) for column in columns),
                number(row.norm),
            ]
            lines.append([*cells, f"{row.error:.2%}"] if self.with_error else cells)
        return aligned(lines)


def number(value: float) -> str:
    return "needs --model" if math.isnan(value) else f"{value:.4g}"


def span(values: Iterable) -> str:
    """`4`, `2-8`, or the words one after another."""
    numbers = sorted(value for value in values if isinstance(value, int | float))
    words = sorted(
        value for value in values if isinstance(value, str) and (value != "-" or not numbers)
    )
    ends = [
        f"{value:g}"
        for value in (numbers[:1] if numbers[:1] == numbers[-1:] else [numbers[0], numbers[-1]])
    ]
    return ", ".join(filter(None, ["-".join(ends), *words])) or "-"


def aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
