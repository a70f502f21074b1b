"""Counters of the report: lists of names that keep only the first ones, and ranges of numbers."""

from dataclasses import dataclass, field

MAX_NAMES = 10


@dataclass
class NameList:
    """Number of samples, and a line for each of the first ones."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str, times: int = 1) -> None:
        """Add a line. `times`: number of samples that it is about."""
        self.count += times
        if len(self.names) < MAX_NAMES:
            self.names.append(name)

    def lines(self) -> list[str]:
        """Return the lines; the last one counts the samples that are not named."""
        num_unnamed = self.count - len(self.names)
        if not num_unnamed:
            return self.names
        return [*self.names, f"... and {num_unnamed} more"]


@dataclass
class ValueRange:
    """Minimum, maximum and mean of numbers that are not kept."""

    minimum: float = float("inf")
    maximum: float = float("-inf")
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Add a number."""
        self.minimum = min(self.minimum, value)
        self.maximum = max(self.maximum, value)
        self.total += value
        self.count += 1

    @property
    def mean(self) -> float:
        """Return the mean; 0 without numbers."""
        if not self.count:
            return 0.0
        return self.total / self.count

    def __str__(self) -> str:
        """Return `2`, or `1 to 3`."""
        if not self.count:
            return "-"
        if self.minimum == self.maximum:
            return f"{self.minimum:g}"
        return f"{self.minimum:g} to {self.maximum:g}"
