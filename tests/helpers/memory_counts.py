"""The memory of a real step on the CPU, counted tensor by tensor, and the plan of it."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from torch import Tensor
from torch.utils._pytree import tree_leaves

from helpers.project import reset_accelerate
from training.block_offload import offloaded_blocks
from training.cli import load_config
from training.memory.live_bytes import LiveBytes
from training.memory.phase_memory import HOST, TRAINING
from training.memory.planner import MemoryPlanner
from training.trainer import Trainer

TOLERANCE = 0.001


def measured_peak(run_here: Any, options: list[str]) -> int:
    """The peak of a run's third step, of all tensors that live then."""
    peaks = []
    original = Trainer.train_step

    def train_step(trainer: Trainer, batches: Iterator) -> None:
        if trainer.state.step < 2:
            return original(trainer, batches)
        live_bytes = LiveBytes()
        engine, ema = trainer.engine, trainer.services.ema
        live_bytes.label(engine.denoiser.parameters(), "base")
        live_bytes.label(engine.denoiser.buffers(), "base")
        live_bytes.label(tensors_of(engine.optimizer.state_dict()), "optimizer")
        live_bytes.label(ema.ema, "adapters")
        for block in offloaded_blocks(engine.adapted.model):
            live_bytes.label([block.host_weights.buffer], HOST)
            if block.copier.next_copy is not None:
                live_bytes.label(block.copier.next_copy.parameters, "base")
        live_bytes.reset_peak()
        with live_bytes:
            original(trainer, labeled(batches, live_bytes))
        peaks.append(live_bytes.peak)

    with mock.patch.object(Trainer, "train_step", train_step):
        assert run_here(options) == 0
    return peaks[-1]


def labeled(batches: Iterator, live_bytes: LiveBytes) -> Iterator:
    """The batches, whose tensors another thread made."""
    for batch in batches:
        live_bytes.label(tensors_of([vars(batch)]), "batch")
        yield batch


def tensors_of(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def planner_of(options: list[str]) -> MemoryPlanner:
    reset_accelerate()
    return MemoryPlanner(load_config(options), is_gpu=False)


def planned_peak(options: list[str]) -> int:
    return planner_of(options).trace([TRAINING], {})[0].total


def assert_planned(run_here: Any, options: list[str], tolerance: float = TOLERANCE) -> None:
    measured = measured_peak(run_here, options)
    planned = planned_peak(options)
    assert planned == pytest.approx(measured, rel=tolerance), planned / measured
