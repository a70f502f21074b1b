"""Validation: the loss on held-out images at fixed noise and fixed noise levels.

The loss is the plain squared error of the prediction, whatever the training loss is
(LossFunction.for_validation), so it is comparable between steps and between runs. Only masks and
weights of the data count as in training. Nothing is drawn from a global generator: a run with
validation takes the same training steps as a run without.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from data.batches import Batch, make_batch
from data.dataset import LatentDataset
from data.schedule import random_key
from training.config import TrainConfig
from training.loss import LossFunction

MAX_SAMPLES = 16
MAX_ELEMENTS = 2**18
"""Samples, and elements of their latents, in a forward pass; a batch of batch_size samples is
always allowed."""


@dataclass(frozen=True)
class ValidationResult:
    """Losses of one validation."""

    losses: dict[str, float]
    """The mean `loss`, and the loss at each noise level."""
    non_finite_rows: list[int]
    """Rows with a loss that is NaN or infinite."""


@dataclass(frozen=True)
class Chunk:
    """A part of the (row, noise level) pairs of one bucket, which is one batch."""

    first_row: int
    """First row of the bucket."""
    num_rows: int
    """Rows of the bucket."""
    start: int
    """First pair of the chunk."""
    size: int
    """Largest number of pairs in the chunk."""


def validation_kind(dataset: LatentDataset, config: TrainConfig) -> str:
    """Return a text that is equal for validations with comparable losses."""
    weights = config.ema.evaluate_with if config.ema.decay else "raw"
    return f"{random_key('validation kind', dataset.content_hash, str(config.validation.noise_levels), weights):x}"


def validation_chunks(dataset: LatentDataset, num_levels: int, batch_size: int) -> list[Chunk]:
    """Split all (row, noise level) pairs into chunks.

    They do not depend on the number of processes, so neither do the kernels and the rounding."""
    chunks = []
    for bucket in dataset.buckets:
        first_row = bucket[0].first
        num_rows = sum(segment.count for segment in bucket)
        num_elements = math.prod(dataset.latent_shape(first_row))
        size = max(batch_size, min(MAX_SAMPLES, MAX_ELEMENTS // num_elements))
        for start in range(0, num_rows * num_levels, size):
            chunks.append(Chunk(first_row, num_rows, start, size))
    return chunks


def chunk_batch(
    dataset: LatentDataset, noise_levels: tuple[float, ...], chunk: Chunk
) -> tuple[list[int], list[int], Batch]:
    """Return the row and the index of the noise level of each sample, and the batch."""
    end = min(chunk.start + chunk.size, chunk.num_rows * len(noise_levels))
    pairs = range(chunk.start, end)
    rows = [chunk.first_row + pair % chunk.num_rows for pair in pairs]
    level_indices = [pair // chunk.num_rows for pair in pairs]
    quantile = torch.tensor([noise_levels[index] for index in level_indices])
    seeds = [random_key("validation", row) for row in rows]
    return rows, level_indices, make_batch(dataset, rows, seeds, range(len(rows)), quantile)


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    denoiser: nn.Module,
    loss_function: LossFunction,
    dataset: LatentDataset,
    config: TrainConfig,
    must_stop: Callable[[], bool],
) -> ValidationResult | None:
    """Return the losses of all held-out images, or None on all processes if `must_stop` returned
    true.

    Collective: all processes take the same number of chunks, because a sharded denoiser needs all of them. Reads the
    device once."""
    noise_levels, device = config.validation.noise_levels, accelerator.device
    sums = torch.zeros(len(noise_levels), device=device)
    non_finite = torch.zeros(len(dataset), device=device)
    chunks = validation_chunks(dataset, len(noise_levels), config.batch_size)
    denoiser.eval()
    for first in range(0, len(chunks), accelerator.num_processes):
        if must_stop():
            denoiser.train()
            return None
        index = first + accelerator.process_index
        is_counted = index < len(chunks)
        rows, level_indices, batch = chunk_batch(
            dataset, noise_levels, chunks[min(index, len(chunks) - 1)]
        )
        with accelerator.autocast():
            losses = loss_function(denoiser, batch.to(device))
        if is_counted:
            sums.index_add_(0, torch.tensor(level_indices, device=device), losses)
            is_non_finite = (~losses.isfinite()).to(non_finite.dtype)
            non_finite.index_add_(0, torch.tensor(rows, device=device), is_non_finite)
    denoiser.train()
    totals = accelerator.reduce(torch.cat([sums, non_finite]), "sum").tolist()
    means = [total / len(dataset) for total in totals[: len(noise_levels)]]
    losses_by_level = {
        f"quantile_{level:g}": mean for level, mean in zip(noise_levels, means, strict=True)
    }
    non_finite_rows = [row for row, count in enumerate(totals[len(noise_levels) :]) if count]
    return ValidationResult({"loss": sum(means) / len(means), **losses_by_level}, non_finite_rows)
