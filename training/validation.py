"""The loss of held-out images at fixed noise and fixed quantiles: comparable between steps and between runs.

It is the plain squared error of the prediction whatever the training loss is (LossFunction.for_validation), at
quantiles of the model's own noise process; only the data's masks and weights count as they do in training.

It draws nothing from a global generator, so a run with validation takes the very same training steps as one without.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from data.batches import Batch, make_batch
from data.dataset import LatentDataset
from data.schedule import key
from training.config import TrainConfig
from training.loss import LossFunction

MOST_SAMPLES, MOST_ELEMENTS = 16, 2**18
"""In a forward: of latents. What a training step takes with gradients is not too much without them."""
Block = tuple[int, int, int, int]


@dataclass(frozen=True)
class Validated:
    """What a validation found."""

    losses: dict[str, float]
    """The mean per quantile, and their mean as `loss`."""
    not_finite: list[int]
    """The rows with a loss that is not."""


def kind_of(dataset: LatentDataset, config: TrainConfig) -> str:
    """The same for validations whose losses compare."""
    shown = config.ema.use if config.ema.decay else "raw"
    return f"{key('validation kind', dataset.fingerprint, str(config.validation.quantiles), shown):x}"


def blocks(dataset: LatentDataset, quantiles: int, batch_size: int) -> list[Block]:
    """First row and number of rows of each bucket, and where each chunk of its (row, quantile) pairs starts, and its
    length. The same whatever the number of processes, so that the kernels are too."""
    found = []
    for bucket in dataset.buckets:
        first, count = bucket[0].first, sum(segment.count for segment in bucket)
        size = max(batch_size, min(MOST_SAMPLES, MOST_ELEMENTS // math.prod(dataset.latent_shape(first))))
        found += [(first, count, start, size) for start in range(0, count * quantiles, size)]
    return found


def chunk(dataset: LatentDataset, quantiles: tuple[float, ...], block: Block) -> tuple[list[int], list[int], Batch]:
    """The row and the index of the quantile of each sample, and the batch, whose samples are of one bucket."""
    first, count, start, size = block
    pairs = range(start, min(start + size, count * len(quantiles)))
    rows, indices = [first + pair % count for pair in pairs], [pair // count for pair in pairs]
    quantile = torch.tensor([quantiles[i] for i in indices])
    seeds = [key("validation", row) for row in rows]
    return rows, indices, make_batch(dataset, rows, seeds, range(len(rows)), quantile)


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    denoiser: nn.Module,
    loss_function: LossFunction,
    dataset: LatentDataset,
    config: TrainConfig,
    leaving: Callable[[], bool],
) -> Validated | None:
    """The losses of all held-out images; None if it was left because `leaving` said so, on all ranks.

    Collective: all ranks take as many chunks, because a sharded denoiser needs all of them; reads the device once.
    """
    quantiles, device = config.validation.quantiles, accelerator.device
    sums, faulty = torch.zeros(len(quantiles), device=device), torch.zeros(len(dataset), device=device)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    todo = blocks(dataset, len(quantiles), config.batch_size)
    denoiser.eval()
    for first in range(0, len(todo), ranks):
        if leaving():
            denoiser.train()
            return None
        mine = first + rank
        rows, indices, batch = chunk(dataset, quantiles, todo[min(mine, len(todo) - 1)])
        with accelerator.autocast():
            losses = loss_function(denoiser, batch.to(device))
        if mine < len(todo):
            sums.index_add_(0, torch.tensor(indices, device=device), losses)
            faulty.index_add_(0, torch.tensor(rows, device=device), (~losses.isfinite()).to(faulty.dtype))
    denoiser.train()
    found = accelerator.reduce(torch.cat([sums, faulty]), "sum").tolist()
    means = [total / len(dataset) for total in found[: len(quantiles)]]
    named = {f"quantile_{q:g}": mean for q, mean in zip(quantiles, means, strict=True)}
    bad = [row for row, count in enumerate(found[len(quantiles) :]) if count]
    return Validated({"loss": sum(means) / len(means), **named}, bad)
