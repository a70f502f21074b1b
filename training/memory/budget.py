"""Options with which a run fits into the memory of a GPU.

Options are tried in the order of their cost, phase by phase. Those that change the result are tried
only if `memory.allow` names them. Afterwards, memory that is left is used for faster training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.config import Quantization
from models.families.unet_family import UNetFamily
from training.memory.changes import Changes, changed_config
from training.memory.config import ResultChange
from training.memory.kept_changes import RESULT_CHANGES
from training.memory.phase_memory import (
    CAPTIONS,
    IMAGES,
    SAMPLES,
    TRAINING,
    VALIDATION,
    PhaseMemory,
    PhaseName,
)
from training.memory.planner import MemoryPlanner

ALL = "all"
"""Value of memory.offload_blocks."""
SMALLER_FORMATS: dict[Quantization, tuple[Quantization, ...]] = {
    "none": ("int8", "fp8", "nf4"),
    "fp8": ("nf4",),
    "int8": ("nf4",),
    "nf4": (),
}
"""model.quantization -> formats that need less memory."""
LEAST_CHANGES: tuple[ResultChange, ...] = ("nf4", "batch_size", "vae_dtype", "vae_tiling")
"""Changes of the result with which a run needs the least memory."""
MAX_PROBES = 3
"""Numbers of recomputed or offloaded blocks that are tried."""


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
        return [name for name in self.changes if name in RESULT_CHANGES]


def fit_into(
    budget: int,
    planner: MemoryPlanner,
    phases: list[PhaseMemory],
    allowed: Sequence[ResultChange],
) -> Fit:
    """Return the changes with which the run fits into a budget, or nearly, if nothing fits.

    `phases`: those of the run without changes. `allowed`: see `memory.allow`."""
    search = Search(budget - planner.reserve, planner, phases)
    search.reduce([CAPTIONS], caption_steps(planner))
    search.reduce([IMAGES], image_steps(planner, allowed))
    search.reduce(search.training_phases, training_steps(planner, allowed))
    search.use_spare_memory()
    search.decide_samples()
    return Fit(budget, search.changes, list(search.phases.values()), planner.reserve)


class Search:
    """The changes so far, and the memory of each phase with them."""

    def __init__(self, budget: int, planner: MemoryPlanner, phases: list[PhaseMemory]):
        """`budget`: bytes for tensors, without the reserve.

        `phases`: those of the run without changes."""
        self.budget, self.planner = budget, planner
        self.changes: Changes = {}
        self.total_before = 0
        """Need before the last step that was taken."""
        self.phases = {phase.name: phase for phase in phases}

    @property
    def training_phases(self) -> list[PhaseName]:
        """The phases with the denoiser, except samples."""
        return [name for name in (TRAINING, VALIDATION) if name in self.phases]

    def total(self, names: list[PhaseName]) -> int:
        return max(self.phases[name].total for name in names)

    def reduce(self, names: list[PhaseName], steps: list[Changes]) -> None:
        """Take steps until all these phases fit.

        A step that does not help is undone. If the last step alone suffices, the others are undone."""
        first_changes, first_total = self.changes, self.total(names)
        for step in steps:
            total = self.total(names)
            if total <= self.budget:
                break
            earlier = self.changes, dict(self.phases)
            self.take(names, step)
            if self.total(names) < total:
                self.total_before = total
            else:
                self.changes, self.phases = earlier
                continue
            is_several = self.changes != {**first_changes, **step}
            if is_several and self.total(names) <= self.budget:
                with_all = self.changes, dict(self.phases)
                self.changes = first_changes
                self.take(names, step)
                if self.total(names) <= self.budget:
                    self.total_before = first_total
                else:
                    self.changes, self.phases = with_all

    def take(self, names: list[PhaseName], step: Changes) -> None:
        """Make a change, and trace the phases that it concerns.

        Other phases keep their earlier numbers."""
        self.changes = {**self.changes, **step}
        for phase in self.planner.trace(names, self.changes):
            self.phases[phase.name] = phase

    def decide_samples(self) -> None:
        """Turn samples off if they do not fit.

        The phases before them were traced with the changes so far, and the samples were not."""
        if SAMPLES not in self.phases:
            return
        if self.changes:
            self.take([SAMPLES], {})
        if self.total([SAMPLES]) > self.budget:
            del self.phases[SAMPLES]
            changes: Changes = {"preview": False}
            if self.planner.config.sample.every:
                changes["sample.every"] = 0
            if self.planner.config.sample.grid:
                changes["sample.grid"] = 0
            self.changes = {**self.changes, **changes}

    def use_spare_memory(self) -> None:
        """Offload and recompute only as many blocks as necessary.

        Other blocks are faster, and keep their weights or their activations on the GPU."""
        names = self.training_phases
        if self.total(names) > self.budget:
            return
        if self.changes.get("memory.offload_blocks") == ALL:
            number = self._num_needed(
                "memory.offload_blocks", self.planner.num_offloadable, self.total_before
            )
            self.take(names, {"memory.offload_blocks": str(number)})
            return
        config = changed_config(self.planner.config, self.changes)
        if (
            not config.gradient_checkpointing
            or config.checkpoint_blocks is not None
            or config.memory.is_offloading
        ):
            return
        step: Changes = {"gradient_checkpointing": False}
        total_without = self._peak_with(step)
        if total_without <= self.budget:
            self.take(names, step)
            return
        num_blocks = self.planner.num_blocks
        number = self._num_needed("checkpoint_blocks", num_blocks, total_without)
        if number < num_blocks:
            self.take(names, {"checkpoint_blocks": number})

    def _num_needed(self, option: str, num_blocks: int, total_without: int) -> int:
        """Return the number of blocks that an option must concern.

        After MAX_PROBES probes it may be too large, and never too small. `num_blocks` are enough.
        `total_without`: the need of training if the option concerns no block."""
        too_few, enough = 0, num_blocks
        total_with = self.total(self.training_phases)
        for _ in range(MAX_PROBES):
            if enough - too_few == 1:
                break
            # blocks are nearly alike, so the need is nearly proportional to their number
            share = (total_without - self.budget) / (total_without - total_with)
            estimate = too_few + math.ceil(share * (enough - too_few))
            number = min(max(estimate, too_few + 1), enough - 1)
            value = str(number) if option == "memory.offload_blocks" else number
            total = self._peak_with({option: value})
            if total <= self.budget:
                enough, total_with = number, total
            else:
                too_few, total_without = number, total
        return enough

    def _peak_with(self, step: Changes) -> int:
        phases = self.planner.trace(self.training_phases, {**self.changes, **step})
        return max(phase.total for phase in phases)


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


def image_steps(planner: MemoryPlanner, allowed: Sequence[ResultChange]) -> list[Changes]:
    """Return the changes with which encoding images takes less memory, one after the other."""
    config = planner.config
    steps: list[Changes] = []
    pixels = config.data.resolution**2
    if config.data.encode_pixels > pixels:
        steps.append({"data.encode_pixels": pixels})
    if config.model.vae_dtype == "fp32" and "vae_dtype" in allowed:
        steps.append({"model.vae_dtype": "bf16"})
    if not config.model.vae_tiling and "vae_tiling" in allowed:
        steps.append({"model.vae_tiling": True})
    return steps


def training_steps(planner: MemoryPlanner, allowed: Sequence[ResultChange]) -> list[Changes]:
    """Return the changes with which training takes less memory, one after the other.

    Quantized weights cost less time than weights that are copied in each step."""
    config = planner.config
    steps: list[Changes] = []
    if not config.gradient_checkpointing:
        steps.append({"gradient_checkpointing": True})
    if config.checkpoint_blocks is not None:
        steps.append({"checkpoint_blocks": None})
    best_depth = 2 if isinstance(planner.family, UNetFamily) else 1
    if config.checkpoint_depth != best_depth:
        steps.append({"checkpoint_depth": best_depth})
    if "batch_size" in allowed:
        steps += batch_steps(config.batch_size, config.grad_accumulation_steps)
    for quantization in smaller_formats(planner):
        if quantization not in allowed:
            continue
        step: Changes = {"model.quantization": quantization}
        if planner.is_compiled:
            step["compile"] = "none"
        steps.append(step)
    if not config.memory.offload_activations:
        steps.append({"gradient_checkpointing": True, "memory.offload_activations": True})
    if config.memory.offload_blocks != ALL:
        steps.append({"gradient_checkpointing": True, "memory.offload_blocks": ALL})
    return steps


def smaller_formats(planner: MemoryPlanner) -> tuple[Quantization, ...]:
    """Return the formats of the denoiser's blocks that need less memory than theirs."""
    quantization = planner.config.model.quantization
    if quantization == "none" and planner.family.files.is_quantized:
        return SMALLER_FORMATS["fp8"]
    return SMALLER_FORMATS[quantization]


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
