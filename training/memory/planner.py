"""The plan of a run's memory: its phases, traced for a config and for changes of it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from common.errors import ModelError
from models.diffusers_family import DiffusersFamily
from training import build
from training.config import TrainConfig
from training.distributed.accelerator import build_accelerator
from training.memory.fake_tensors import fake_tensors
from training.memory.phases import (
    CAPTIONS,
    IMAGES,
    PREVIEW,
    TRAINING,
    VALIDATION,
    PhaseMemory,
    PhaseName,
    PhaseTracer,
    SampleShape,
    TracedTraining,
)

Changes = dict[str, Any]
"""Option, as on the command line without dashes -> its new value."""


class MemoryPlanner:
    """Traces the phases of a run on the CPU, with tensors that have no values.

    A plan is made for one process that has the whole model."""

    def __init__(self, config: TrainConfig, is_gpu: bool):
        """`is_gpu`: plan for a GPU, whose autocast and allocator differ from the CPU's."""
        self.config, self.is_gpu = config, is_gpu
        family = build.load_family(config)
        if not isinstance(family, DiffusersFamily):
            raise ModelError(f"--model.family {family.name}: cannot be planned")
        self.family = family
        self.accelerator = build_accelerator(config)
        self.num_blocks = 0
        """Blocks that can be recomputed."""

    @property
    def sample(self) -> SampleShape:
        """Size of the largest sample."""
        return SampleShape.largest(self.config, self.family)

    def phases(self) -> list[PhaseMemory]:
        """Return the memory of all phases, in the order of a run."""
        names = [CAPTIONS, IMAGES, TRAINING, VALIDATION]
        if self.config.preview:
            names.append(PREVIEW)
        return self.trace(names, {})

    def trace(self, names: Sequence[PhaseName], changes: Changes) -> list[PhaseMemory]:
        """Return the memory of some phases of the run with changed options."""
        config = changed_config(self.config, changes)
        self.family.config = config.model
        tracer = PhaseTracer(config, self.family, self.accelerator, self.is_gpu)
        phases = []
        with fake_tensors(self.is_gpu):
            training: TracedTraining | None = None
            for name in names:
                if name == CAPTIONS:
                    phases.append(tracer.captions())
                elif name == IMAGES:
                    phases.append(tracer.media())
                else:
                    training = training or TracedTraining(tracer)
                    self.num_blocks = training.num_blocks
                    phases.append(training.phase(name))
        return phases


def changed_config(config: TrainConfig, changes: Changes) -> TrainConfig:
    """Return a config with options changed, by their names on the command line."""
    for name, value in changes.items():
        section_name, _, field = name.rpartition(".")
        if section_name:
            section = replace(getattr(config, section_name), **{field: value})
            config = replace(config, **{section_name: section})
        else:
            config = replace(config, **{field: value})
    return config
