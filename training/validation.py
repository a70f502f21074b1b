"""Validation: the loss on held-out images at fixed noise and fixed noise levels.

The loss is always the squared error of the prediction, so it is comparable between steps and runs
(LossFunction.for_validation). Masks and weights of the data count as in training. Nothing is drawn
from a global generator: a run with validation takes the same training steps as a run without.
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


def comparison_key(dataset: LatentDataset, config: TrainConfig) -> str:
    """Return a text that is equal for validations with comparable losses."""
    weights = "raw"
    if config.ema.decay:
        weights = config.ema.evaluate_with
    noise_levels = str(config.validation.noise_levels)
    number = random_key(
        "validation",
        dataset.content_hash,
        noise_levels,
        weights,
    )
    return f"{number:x}"


def validation_batch_size(latent_shape: tuple[int, ...], batch_size: int) -> int:
    """Return the largest number of samples in a forward pass.

    `latent_shape`: of one sample."""
    num_elements = math.prod(latent_shape)
    num_samples = MAX_ELEMENTS // num_elements
    largest_size = min(MAX_SAMPLES, num_samples)
    return max(batch_size, largest_size)


def validation_chunks(dataset: LatentDataset, num_levels: int, batch_size: int) -> list[Chunk]:
    """Split all (row, noise level) pairs into chunks.

    They do not depend on the number of processes, so neither do the kernels and the rounding."""
    chunks = []
    for bucket in dataset.buckets:
        first_row = bucket[0].first
        num_rows = sum(segment.count for segment in bucket)
        latent_shape = dataset.latent_shape(first_row)
        size = validation_batch_size(latent_shape, batch_size)
        num_pairs = num_rows * num_levels
        for start in range(0, num_pairs, size):
            chunk = Chunk(first_row, num_rows, start, size)
            chunks.append(chunk)
    return chunks


def chunk_batch(
    dataset: LatentDataset, noise_levels: tuple[float, ...], chunk: Chunk
) -> tuple[list[int], list[int], Batch]:
    """Return the row and the index of the noise level of each sample, and the batch."""
    num_pairs = chunk.num_rows * len(noise_levels)
    end = min(chunk.start + chunk.size, num_pairs)
    rows, level_indices = [], []
    for pair in range(chunk.start, end):
        level_index, offset = divmod(pair, chunk.num_rows)
        level_indices.append(level_index)
        rows.append(chunk.first_row + offset)
    all_levels = torch.tensor(noise_levels)
    quantile = all_levels[level_indices]
    seeds = [random_key("validation", row) for row in rows]
    batch = make_batch(
        dataset,
        rows,
        seeds,
        visits=range(len(rows)),
        quantile=quantile,
    )
    return rows, level_indices, batch


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

    Collective: all processes take the same number of chunks, because a sharded denoiser needs all
    of them. Reads the device once."""
    noise_levels = config.validation.noise_levels
    num_levels = len(noise_levels)
    device = accelerator.device
    sums = torch.zeros(num_levels, device=device)
    non_finite = torch.zeros(len(dataset), device=device)
    chunks = validation_chunks(dataset, num_levels, config.batch_size)
    denoiser.eval()
    for first in range(0, len(chunks), accelerator.num_processes):
        if must_stop():
            denoiser.train()
            return None
        index = first + accelerator.process_index
        chunk = chunks[min(index, len(chunks) - 1)]
        rows, level_indices, batch = chunk_batch(dataset, noise_levels, chunk)
        with accelerator.autocast():
            losses = loss_function(denoiser, batch.to(device))
        if index < len(chunks):
            level_index = torch.tensor(level_indices, device=device)
            row_index = torch.tensor(rows, device=device)
            is_non_finite = ~losses.isfinite()
            sums.index_add_(0, level_index, losses)
            non_finite.index_add_(0, row_index, is_non_finite.to(non_finite.dtype))
    denoiser.train()
    local_totals = torch.cat([sums, non_finite])
    totals = accelerator.reduce(local_totals, "sum").tolist()
    means = [total / len(dataset) for total in totals[:num_levels]]
    all_losses = {"loss": sum(means) / len(means)}
    for level, mean in zip(noise_levels, means, strict=True):
        all_losses[f"quantile_{level:g}"] = mean
    counts = totals[num_levels:]
    non_finite_rows = [row for row, count in enumerate(counts) if count]
    return ValidationResult(all_losses, non_finite_rows)
