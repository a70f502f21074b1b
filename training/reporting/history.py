"""Losses of a run: buffered on the device, then kept as numbers in the history that checkpoints and
loss.json hold."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

MAX_MICRO_LOSSES = 1_000_000
"""Losses of micro-batches that a history holds; a thousand processes make this many in a thousand
steps."""

Validation = dict[str, float]
"""One validation: its `step`, the mean `loss`, and the loss at each noise level."""


class TrainingDiverged(RuntimeError):
    """A loss or gradient that is NaN or infinite."""


@dataclass
class ValidationSeries:
    """Validations whose losses are comparable: the same held-out images, noise levels and weights."""

    comparison_key: str
    """Equal for validations with comparable losses."""
    entries: list[Validation] = field(default_factory=list)


@dataclass
class History:
    """Losses, gradient norms and validations of a run."""

    micro_batches_per_step: int
    step_losses: list[float] = field(default_factory=list)
    micro_losses: list[float] = field(default_factory=list)
    """Losses of all micro-batches of all processes, in schedule order. Empty beyond
    MAX_MICRO_LOSSES."""
    grad_norms: list[float] = field(default_factory=list)
    validation_series: list[ValidationSeries] = field(default_factory=list)
    """The last one is the current series; the earlier ones are not comparable with it."""
    skipped_steps: list[int] = field(default_factory=list)
    """Steps, counted from 1, that changed nothing because their gradient was not finite."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "History":
        """Rebuild a history from `dataclasses.asdict`."""
        series = [ValidationSeries(**entry) for entry in values["validation_series"]]
        return cls(**{**values, "validation_series": series})

    @property
    def validation(self) -> list[Validation]:
        """Return the validations of the current series."""
        return self.validation_series[-1].entries if self.validation_series else []

    @property
    def earlier_validation(self) -> list[Validation]:
        """Return the validations of earlier series."""
        return [entry for series in self.validation_series[:-1] for entry in series.entries]

    def start_series(self, comparison_key: str) -> bool:
        """Continue the current series if it has this key, else start one. Return whether it
        ended an earlier one."""
        if not self.validation_series:
            self.validation_series.append(ValidationSeries(comparison_key))
            return False
        current = self.validation_series[-1]
        if current.comparison_key == comparison_key or not current.entries:
            current.comparison_key = comparison_key
            return False
        self.validation_series.append(ValidationSeries(comparison_key))
        return True

    def add_steps(self, micro_losses: list[float], grad_norms: list[float]) -> None:
        """Append whole steps."""
        per_step = self.micro_batches_per_step
        num_steps = len(self.step_losses) + len(grad_norms)
        for first in range(0, len(micro_losses), per_step):
            self.step_losses.append(sum(micro_losses[first : first + per_step]) / per_step)
        self.grad_norms += grad_norms
        if num_steps * per_step <= MAX_MICRO_LOSSES:
            self.micro_losses += micro_losses
        else:
            self.micro_losses = []


def is_finite(values: Iterable[float]) -> bool:
    """Return whether no value is NaN or infinite."""
    return all(abs(value) < float("inf") for value in values)


def finite_mean(values: list[float]) -> float:
    """Return the mean of the finite values; NaN without any."""
    finite_values = [value for value in values if is_finite([value])]
    if not finite_values:
        return float("nan")
    return sum(finite_values) / len(finite_values)


class LossBuffer:
    """Losses and gradient norms since the last log, still on the device."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.preservation: list[Tensor] = []
        """Differences from the base's predictions, before their weight."""

    def read(self, accelerator: Accelerator) -> tuple[list[float], list[float]]:
        """Empty the buffer; return micro-batch losses in schedule order, and gradient norms.

        Reads the device once. Collective."""
        if not self.norms:
            return [], []
        gathered = accelerator.gather(
            torch.stack(self.losses)
        )  # (processes * micro-batches,), process by process
        losses = gathered.view(accelerator.num_processes, -1).T.reshape(-1)
        values = torch.cat([losses, torch.stack(self.norms)]).tolist()
        num_losses = len(losses)
        self.losses, self.norms = [], []
        return values[:num_losses], values[num_losses:]

    def read_preservation(self, accelerator: Accelerator) -> float | None:
        """Empty the buffer of preservation losses; return their mean, or None. Collective."""
        if not self.preservation:
            return None
        own_mean = torch.stack(self.preservation).mean()
        self.preservation = []
        return accelerator.gather(own_mean).mean().item()


class DataTimer:
    """Share of the training time that is spent waiting for data."""

    def __init__(self) -> None:
        self.waiting_seconds = 0.0
        self.total_seconds = 0.0
        self._last_end: float | None = None

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measure a block that waits for a batch; the time since the previous block counts as
        computing."""
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self.waiting_seconds += end - start
        self.total_seconds += end - (start if self._last_end is None else self._last_end)
        self._last_end = end

    @property
    def share(self) -> float:
        return self.waiting_seconds / self.total_seconds if self.total_seconds else 0.0
