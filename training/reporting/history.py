"""What a run reports: losses kept on the device until they are logged, loss.json, loss.png."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

MOST_MICRO_LOSSES = 1_000_000
"""Every checkpoint holds them, and a thousand ranks make a million of them within a thousand steps."""


class TrainingDiverged(RuntimeError):
    """A loss or gradient that is not finite."""


@dataclass
class History:
    """All losses of a run: what a checkpoint keeps of its past, and loss.json shows."""

    micro_batches_per_step: int
    step_losses: list[float] = field(default_factory=list)
    micro_losses: list[float] = field(default_factory=list)
    """One per micro-batch in schedule order, over all ranks; none once they would be more than MOST_MICRO_LOSSES."""
    grad_norms: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    validation_kind: str = ""
    """Stands for the held-out images, and for what is measured on them."""
    other_validation: list[dict[str, float]] = field(default_factory=list)
    """Earlier ones, of other kinds: they do not compare."""
    skipped: list[int] = field(default_factory=list)
    """Steps, counted from 1, that changed nothing because their gradient was not finite."""

    def validate_by(self, kind: str) -> bool:
        """From here on validation losses are of this kind; whether that puts earlier ones aside."""
        other = bool(self.validation) and self.validation_kind not in ("", kind)
        if other:
            self.other_validation += self.validation
            self.validation = []
        self.validation_kind = kind
        return other

    def add(self, micro_losses: list[float], grad_norms: list[float]) -> None:
        """Whole steps, the next ones."""
        n, steps = self.micro_batches_per_step, len(self.step_losses) + len(grad_norms)
        self.step_losses += [sum(micro_losses[i : i + n]) / n for i in range(0, len(micro_losses), n)]
        self.grad_norms += grad_norms
        if steps * n <= MOST_MICRO_LOSSES:
            self.micro_losses += micro_losses
        else:
            self.micro_losses = []


def is_finite(values: Iterable[float]) -> bool:
    return all(abs(value) < float("inf") for value in values)  # False for NaN too


def finite_mean(values: list[float]) -> float:
    """The mean of the values that are finite; NaN if none is."""
    finite = [value for value in values if is_finite([value])]
    return sum(finite) / len(finite) if finite else float("nan")


class Pending:
    """Losses and gradient norms of the steps since the last log, still on the device."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def read(self, accelerator: Accelerator) -> tuple[list[float], list[float]]:
        """(micro losses in schedule order, gradient norms), with one device read, and forgets them. Collective."""
        if not self.norms:
            return [], []
        losses = accelerator.gather(torch.stack(self.losses))  # (ranks * micro-batches,), one rank after the other
        losses = losses.view(accelerator.num_processes, -1).T.reshape(-1)
        values = torch.cat([losses, torch.stack(self.norms)]).tolist()
        count = len(losses)
        self.losses, self.norms = [], []
        return values[:count], values[count:]


class Waiting:
    """How much of the time between two steps went by waiting for the data."""

    def __init__(self) -> None:
        self.waited = self.total = 0.0
        self._marked: float | None = None

    @contextmanager
    def for_data(self) -> Iterator[None]:
        """The block waits for a batch; the time since the last such block is that of a step."""
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self.waited += end - start
        self.total += end - (start if self._marked is None else self._marked)
        self._marked = end

    @property
    def share(self) -> float:
        return self.waited / self.total if self.total else 0.0


def flat(config: dict, prefix: str = "") -> dict[str, Any]:
    """A nested config as dotted names and plain values, which every tracker takes."""
    result: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value if isinstance(value, int | float | str) else str(value)
    return result
