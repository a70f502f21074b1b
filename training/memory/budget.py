"""Options with which a run fits into the memory of a GPU.

Options are tried in the order of their cost, phase by phase: first those that cost little time, then
those that change the result. Afterwards, memory that is left is used for faster training.
"""

from dataclasses import dataclass
from typing import Any

from models.families.unet_family import UNetFamily
from training.memory.phase_memory import (
    CAPTIONS,
    IMAGES,
    PREVIEW,
    TRAINING,
    VALIDATION,
    PhaseMemory,
    PhaseName,
)
from training.memory.planner import Changes, MemoryPlanner, changed_config

RESERVE = 2**30
"""Bytes of a GPU that are not counted: CUDA itself, workspaces of its libraries, and gaps."""
SMALLER_FORMATS = {"none": ("int8", "nf4"), "fp8": ("nf4",), "int8": ("nf4",), "nf4": ()}
"""model.quantization -> formats that need less memory."""
CHANGES_RESULT = ("batch_size", "model.quantization", "model.vae_tiling", "model.vae_dtype")
"""Options that change the result. With another batch size, other samples make a step."""
MAX_PROBES = 4
"""Numbers of recomputed blocks that are tried."""


@dataclass(frozen=True)
class Fit:
    """The changes with which a run fits into a budget, and its phases with them."""

    budget: int
    changes: Changes
    phases: list[PhaseMemory]
    reserve: int
    """Bytes that are not counted."""

    @property
    def peak(self) -> int:
        """The memory that the GPU must have."""
        return self.reserve + max(phase.total for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.peak <= self.budget

    @property
    def result_changes(self) -> list[str]:
        """Names of the changes that change the result."""
        return [name for name in self.changes if name in CHANGES_RESULT]


def fit_into(budget: int, planner: MemoryPlanner, phases: list[PhaseMemory]) -> Fit:
    """Return the changes with which the run fits into a budget, or nearly, if nothing fits.

    `phases`: those of the run without changes."""
    reserve = RESERVE if planner.is_gpu else 0
    search = Search(budget - reserve, planner, phases)
    search.reduce([CAPTIONS], caption_steps(planner))
    search.reduce([IMAGES], image_steps(planner))
    search.reduce(search.training_phases, training_steps(planner))
    search.use_spare_memory()
    search.decide_preview()
    return Fit(budget, search.changes, list(search.phases.values()), reserve)


class Search:
    """The changes so far, and the memory of each phase with them."""

    def __init__(self, budget: int, planner: MemoryPlanner, phases: list[PhaseMemory]):
        """`budget`: bytes for tensors, without the reserve.

        `phases`: those of the run without changes."""
        self.budget, self.planner = budget, planner
        self.changes: Changes = {}
        self.phases = {phase.name: phase for phase in phases}

    @property
    def training_phases(self) -> list[PhaseName]:
        """The phases with the denoiser, except the preview."""
        return [name for name in (TRAINING, VALIDATION) if name in self.phases]

    def total(self, names: list[PhaseName]) -> int:
        return max(self.phases[name].total for name in names)

    def reduce(self, names: list[PhaseName], steps: list[Changes]) -> None:
        """Take steps until all these phases fit.

        A step that does not help is undone."""
        for step in steps:
            total = self.total(names)
            if total <= self.budget:
                return
            earlier = self.changes, dict(self.phases)
            self.take(names, step)
            if self.total(names) >= total:
                self.changes, self.phases = earlier

    def take(self, names: list[PhaseName], step: Changes) -> None:
        """Make a change, and trace the phases that it concerns.

        Other phases keep their earlier numbers."""
        self.changes = {**self.changes, **step}
        for phase in self.planner.trace(names, self.changes):
            self.phases[phase.name] = phase

    def decide_preview(self) -> None:
        """Keep the text encoders out of the preview, or turn it off, if it does not fit.

        The phases before it were traced with the changes so far, and the preview was not."""
        if PREVIEW not in self.phases:
            return
        if self.changes:
            self.take([PREVIEW], {})
        changes_before = self.changes
        config = changed_config(self.planner.config, self.changes)
        is_too_large = self.total([PREVIEW]) > self.budget
        if is_too_large and config.model.text_encoder_placement == "device":
            self.take([CAPTIONS, PREVIEW], {"model.text_encoder_placement": "layers"})
        if self.total([PREVIEW]) > self.budget:
            del self.phases[PREVIEW]
            self.changes = {**changes_before, "preview": False}

    def use_spare_memory(self) -> None:
        """Recompute only as many blocks as necessary, if all are recomputed and there is room.

        Blocks that are not recomputed are faster, and keep their activations."""
        config = changed_config(self.planner.config, self.changes)
        num_blocks = self.planner.num_blocks
        names = self.training_phases
        can_be_faster = config.gradient_checkpointing and config.checkpoint_blocks is None
        if not can_be_faster or self.total(names) > self.budget or num_blocks < 2:
            return
        step: Changes = {"gradient_checkpointing": False}
        if self._peak_with(step) <= self.budget:
            self.take(names, step)
            return
        num_kept = self._num_kept_blocks(num_blocks)
        if num_kept:
            self.take(names, {"checkpoint_blocks": num_blocks - num_kept})

    def _num_kept_blocks(self, num_blocks: int) -> int:
        """Return the number of blocks that need not be recomputed, found by bisection.

        After MAX_PROBES probes it may be too small, and never too large."""
        fitting, too_many = 0, num_blocks
        for _ in range(MAX_PROBES):
            middle = (fitting + too_many) // 2
            if middle == fitting:
                break
            step: Changes = {"checkpoint_blocks": num_blocks - middle}
            if self._peak_with(step) <= self.budget:
                fitting = middle
            else:
                too_many = middle
        return fitting

    def _peak_with(self, step: Changes) -> int:
        phases = self.planner.trace([TRAINING], {**self.changes, **step})
        return phases[0].total


def caption_steps(planner: MemoryPlanner) -> list[Changes]:
    """Return the changes with which encoding captions takes less memory, one after the other."""
    steps: list[Changes] = []
    if planner.config.model.text_encoder_placement == "device":
        steps.append({"model.text_encoder_placement": "layers"})
    if planner.config.data.encode_batch_size > 1:
        steps.append({"data.encode_batch_size": 1})
    if planner.config.model.text_encoder_placement != "cpu":
        steps.append({"model.text_encoder_placement": "cpu"})
    return steps


def image_steps(planner: MemoryPlanner) -> list[Changes]:
    """Return the changes with which encoding images takes less memory, one after the other."""
    config = planner.config
    steps: list[Changes] = []
    pixels = config.data.resolution**2
    if config.data.encode_pixels > pixels:
        steps.append({"data.encode_pixels": pixels})
    if config.model.vae_dtype == "fp32":
        steps.append({"model.vae_dtype": "bf16"})
    if not config.model.vae_tiling:
        steps.append({"model.vae_tiling": True})
    return steps


def training_steps(planner: MemoryPlanner) -> list[Changes]:
    """Return the changes with which training takes less memory, one after the other."""
    config = planner.config
    steps: list[Changes] = []
    if not config.gradient_checkpointing:
        steps.append({"gradient_checkpointing": True})
    if config.checkpoint_blocks is not None:
        steps.append({"checkpoint_blocks": None})
    best_depth = 2 if isinstance(planner.family, UNetFamily) else 1
    if config.checkpoint_depth != best_depth:
        steps.append({"checkpoint_depth": best_depth})
    steps += batch_steps(config.batch_size, config.grad_accumulation_steps)
    for quantization in SMALLER_FORMATS[config.model.quantization]:
        step: Changes = {"model.quantization": quantization}
        if planner.is_compiled:
            step["compile"] = "none"
        steps.append(step)
    return steps


def batch_steps(batch_size: int, accumulation_steps: int) -> list[Changes]:
    """Return smaller batches with as many samples per step."""
    steps: list[Changes] = []
    num_samples = batch_size * accumulation_steps
    for smaller_size in range(batch_size - 1, 0, -1):
        if num_samples % smaller_size == 0:
            changes: dict[str, Any] = {
                "batch_size": smaller_size,
                "grad_accumulation_steps": num_samples // smaller_size,
            }
            steps.append(changes)
    return steps
