"""The plan of a run's memory: its phases, traced for a config and for changes of it."""

from collections.abc import Sequence

import torch

from common.errors import ConfigError, ModelError
from data.media.video import ClipSampling
from models.component_loaders import check_fp16
from models.diffusers_family import DiffusersFamily
from training import build
from training.assistant import empty_assistant
from training.config import TrainConfig
from training.distributed.accelerator import build_accelerator
from training.loss import build_loss
from training.memory.changes import Changes, changed_config
from training.memory.config import GIB
from training.memory.encoding_trace import trace_captions, trace_images
from training.memory.fake_tensors import fake_tensors
from training.memory.phase_memory import (
    CAPTIONS,
    IMAGES,
    SAMPLES,
    TRAINING,
    VALIDATION,
    PhaseMemory,
    PhaseName,
)
from training.memory.sample_shape import (
    control_layout,
    largest_encoded_sample,
    largest_sample,
)
from training.memory.training_trace import TraceInputs, TrainingTrace

RESERVE = GIB
"""Bytes of a GPU that are not counted: CUDA itself, workspaces of its libraries, and gaps."""
GPU_ALLOCATION_UNIT = 512
"""PyTorch's CUDA allocator gives multiples of so many bytes."""
UNPLANNED: Changes = {"compile": "none", "optim.on_non_finite": "stop"}
"""Options that a plan leaves out."""


class MemoryPlanner:
    """Traces the phases of a run on the CPU, with tensors that have no values.

    A plan is made for one process that has the whole model."""

    def __init__(self, config: TrainConfig, is_gpu: bool):
        """`is_gpu`: plan for a GPU, whose autocast and allocator differ from the CPU's."""
        self.config = changed_config(config, UNPLANNED)
        self.is_gpu = is_gpu
        self.is_compiled = config.compile != "none"
        self.unit = GPU_ALLOCATION_UNIT if is_gpu else 1
        self.reserve = RESERVE if is_gpu else 0
        self.accelerator = build_accelerator(config)
        self.family = plannable_family(config)
        self.sample = largest_sample(config, self.family)
        self.assistant = empty_assistant(config.model, self.family)
        self.num_blocks = 0
        """Blocks that can be recomputed. It is known after training was traced."""
        self.num_offloadable = 0
        """Blocks that can be offloaded, likewise."""

    def phases(self) -> list[PhaseMemory]:
        """Return the memory of all phases, in the order of a run."""
        names = [CAPTIONS, IMAGES, TRAINING]
        data = self.config.training_data
        if data.validation_path is not None or data.validation_fraction:
            names.append(VALIDATION)
        if self.config.draws_samples:
            names.append(SAMPLES)
        return self.trace(names, {})

    def trace(self, names: Sequence[PhaseName], changes: Changes) -> list[PhaseMemory]:
        """Return the memory of some phases of the run with changed options."""
        config = changed_config(self.config, changes)
        family = plannable_family(config)
        inputs = self._trace_inputs(config, family)
        phases = []
        training: TrainingTrace | None = None
        with fake_tensors(self.is_gpu):
            for name in names:
                if name == CAPTIONS:
                    phases.append(trace_captions(config, family, self.unit))
                elif name == IMAGES:
                    sample = largest_encoded_sample(config, family)
                    phases.append(trace_images(config, family, sample, self.unit))
                else:
                    training = training or TrainingTrace(inputs)
                    self.num_blocks = training.num_blocks
                    self.num_offloadable = training.num_offloadable
                    phases.append(training.phase(name))
        return phases

    def _trace_inputs(self, config: TrainConfig, family: DiffusersFamily) -> TraceInputs:
        dtype = build.BASE_DTYPES[config.training_dtype] or stored_dtype(family)
        caption_layout = family.cond_layout()
        sample_layout = family.sample_layout(self.sample.latents)
        sample_layout |= control_layout(config.data, family)
        return TraceInputs(
            config=config,
            family=family,
            accelerator=self.accelerator,
            loss_function=build_loss(family, config.objective, config.loss_function, dtype),
            sample=self.sample,
            cond_layout={**caption_layout, **sample_layout},
            unit=self.unit,
            assistant=self.assistant,
        )


def plannable_family(config: TrainConfig) -> DiffusersFamily:
    """Return the family of a config's model. Raises ModelError if it cannot be planned."""
    family = build.load_family(config)
    if not isinstance(family, DiffusersFamily):
        raise ModelError(f"--model.family {family.name}: cannot be planned")
    frame_error = family.limits.frame_error(config.data.frames)
    if frame_error is not None:
        raise ConfigError(f"--data.frames {config.data.frames}: {frame_error}")
    ClipSampling.of(config.data, family.limits.frame_step, family.limits.fps)  # checks the frames
    if config.model.vae_dtype == "fp16":
        check_fp16(family.vae_config)
    return family


def stored_dtype(family: DiffusersFamily) -> torch.dtype:
    """Return the dtype of the denoiser's weights if they are not converted.

    Without weights, as for a released model, it is bf16."""
    try:
        return family.files.trained_dtype()
    except ModelError:
        return torch.bfloat16
