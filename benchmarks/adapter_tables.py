"""Figures of benchmarks/adapters.py, and the tables that show them."""

from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import NamedTuple

from benchmarks.implementations import PEERS

OURS = "ours"
COLUMNS = (OURS, *PEERS)


@dataclass
class Result:
    """Figures of one implementation of a setting on a layer."""

    saved: float = 0.0
    """MiB that autograd keeps for the backward pass."""
    mode: str = ""
    error: str = ""
    """Why there are no figures; empty if there are."""
    seconds: list[float] = field(default_factory=list)
    """CPU seconds of each turn."""


@dataclass(frozen=True)
class Ratio:
    """Median over the turns of a time relative to another one in the same turn, and two standard
    errors of that median."""

    value: float
    noise: float

    @classmethod
    def of(cls, numerators: list[float], denominators: list[float]) -> "Ratio":
        ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
        if len(ratios) < 2:
            return cls(ratios[0], float("inf"))
        low, _, high = quantiles(ratios, n=4, method="inclusive")
        return cls(median(ratios), 2 * 1.253 * (high - low) / 1.349 / len(ratios) ** 0.5)

    def __str__(self) -> str:
        return f"{self.value:.3f} +-{self.noise:.3f}"


class Verdict(NamedTuple):
    """A bar and its status: "met", "MISSED", or "even" if the difference is smaller than the
    noise."""

    status: str
    text: str

    @classmethod
    def of(cls, is_met: bool, text: str) -> "Verdict":
        return cls("met" if is_met else "MISSED", text)


class Table:
    """Prints rows as they are measured, then the footnotes."""

    def __init__(self, name: str, note: str, is_timed: bool = True):
        self.notes: list[str] = []
        print(f"\n{name}: {note}")
        print(f"{'':14}" + "".join(f"{column:>24}" for column in COLUMNS))
        units = f"{'time' if is_timed else '':>18}{'MiB':>6}"
        print(f"{'':14}" + units * len(COLUMNS), flush=True)

    def row(self, name: str, results: dict[str, Result], floor: Result | None) -> None:
        """Print the results of a setting. `floor`: None for memory only."""
        cells = []
        for column in COLUMNS:
            result = results[column]
            if result.error:
                text = f"- {self._note(result.error)}"
                cells.append(f"{text:>24}")
                continue
            ratio = ""
            if floor is not None:
                ratio = str(Ratio.of(result.seconds, floor.seconds))
            cells.append(f"{ratio:>18}{result.saved:6.1f}")
        modes = [results[column].mode for column in COLUMNS if not results[column].error]
        print(f"{name:14}" + "".join(cells) + f"  {modes[0] if modes else ''}", flush=True)

    def _note(self, text: str) -> str:
        """Return the number of a footnote in brackets."""
        if text not in self.notes:
            self.notes.append(text)
        return f"[{self.notes.index(text) + 1}]"

    def print_notes(self) -> None:
        for number, text in enumerate(self.notes, 1):
            print(f"  [{number}] {text}")
