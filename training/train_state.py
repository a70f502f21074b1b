"""The state of a run: everything that changes from step to step, besides the weights."""

from dataclasses import dataclass

from training.checkpoints.best import BestWeights
from training.reporting.history import History


@dataclass
class TrainState:
    """State that a checkpoint keeps, and that the trainer and its callbacks change."""

    step: int
    """Optimizer steps done. Schedule, noise and learning rate follow from it (data/schedule.py)."""
    micro_batches_per_step: int
    """Micro-batches of all processes. A resumed run keeps this number, also with another number of
    processes."""
    started_at: float
    """Seconds since the epoch."""
    history: History
    best: BestWeights | None = None
    saved_step: int | None = None
    """Step of the last checkpoint."""
    validation_interrupted: bool = False
    """A validation of this step was stopped; the resumed run repeats it."""
