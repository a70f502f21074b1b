"""The planned memory of a run is the memory that the run takes: real steps on the CPU, counted tensor by tensor."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.family_cases import SIDE, Case, cases, folder_of
from helpers.project import reset_accelerate, write_animations
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lora_algos import ALGORITHMS
from training import activation_offload
from training.block_offload import offloaded_blocks
from training.cli import load_config
from training.memory.live_bytes import LiveBytes
from training.memory.phase_memory import HOST, IMAGES, TRAINING, VAE
from training.memory.planner import MemoryPlanner
from training.trainer import Trainer

TOLERANCE = 0.001
LONG_CAPTION = "a cat and a dog " * 200
"""More tokens than any text encoder here reads."""


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


PLAIN = ()
CHANGES = [
    PLAIN,
    ("--training_dtype=bf16", "--gradient_checkpointing"),
    ("--gradient_checkpointing", "--checkpoint_depth=2", "--grad_accumulation_steps=2"),
    ("--gradient_checkpointing", "--checkpoint_blocks=3", "--ema.decay=0.9"),
    ("--gradient_checkpointing", "--checkpoint_policy=keep-attention-output", "--rank=64"),
    ("--model.quantization=int8", "--training_dtype=bf16"),
    ("--model.quantization=nf4", "--gradient_checkpointing"),
    ("--optimizer=SGD", "--batch_size=1"),
    ("--gradient_checkpointing", "--memory.offload_blocks=all", "--memory.offload_activations"),
    (
        "--gradient_checkpointing",
        "--memory.offload_blocks=3",
        "--checkpoint_depth=2",
        "--model.quantization=nf4",
    ),
]


@pytest.fixture(autouse=True)
def small_activations(monkeypatch):
    """Activations of tiny models are offloaded too."""
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1024)


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(changes) or "plain")
def test_a_step_takes_the_planned_memory(options, run_here, changes):
    assert_planned(run_here, [*options, *changes])


@pytest.mark.long
@pytest.mark.parametrize("quantization", ["none", "fp8", "int8", "nf4"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_step_of_every_algorithm_takes_the_planned_memory(
    options, run_here, algorithm, quantization
):
    more = [
        f"--algorithm={algorithm}",
        f"--model.quantization={quantization}",
        "--gradient_checkpointing",
    ]
    assert_planned(run_here, [*options, "--training_dtype=bf16", *more])


@pytest.mark.long
@pytest.mark.parametrize(
    "optimizer", ["Adam", "RMSprop", "Adafactor", "Muon", "Lion", "CAME", "ScheduleFreeAdamW"]
)
def test_a_step_of_other_optimizers_takes_the_planned_memory(options, run_here, optimizer):
    assert_planned(run_here, [*options, f"--optimizer={optimizer}"])


@pytest.mark.long
@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_step_of_every_family_takes_the_planned_memory(
    options, run_here, case: Case, images, tmp_path
):
    for path in images.glob("*.txt"):
        path.write_text(LONG_CAPTION)
    more = [f"--model.path={folder_of(case)}", f"--data.resolution={SIDE}", "--no_bucket_mode"]
    if case.first_frame:
        more += [f"--data.path={write_animations(tmp_path / 'clips')}", "--data.frames=5"]
    # the counted step does not make the tables of positions, which some models make once and keep
    assert_planned(run_here, [*options, *more, "--gradient_checkpointing"], tolerance=0.04)


def test_encoding_images_takes_the_planned_memory(options):
    planner = planner_of(options)
    planned = planner.trace([IMAGES], {})[0].total
    encoders = planner.family.load_encoders("media")
    live_bytes = LiveBytes()
    live_bytes.label(encoders.vae.parameters(), VAE)
    with torch.no_grad(), live_bytes:
        planner.family.encode_media(encoders, torch.zeros(8, 3, 64, 64))
    assert planned == pytest.approx(live_bytes.peak, rel=TOLERANCE)
