"""The loss of held-out images at fixed noise and fixed quantiles: comparable between steps and between runs.

It is the plain squared error of the prediction whatever the training loss is (LossFunction.for_validation), at
quantiles of the model's own noise process; only the data's masks and weights count as they do in training.

It draws nothing from a global generator, so a run with validation takes the very same training steps as one without.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from data.batches import Batch, make_batch
from data.index import LatentDataset
from data.schedule import key
from training.step import LossFunction

CHUNK = 16  # samples per forward; the same for every run, so that the kernels are too


def blocks(dataset: LatentDataset, quantiles: int) -> list[tuple[int, int, int]]:
    """First row and number of rows of each bucket, and where each chunk of its (row, quantile) pairs starts."""
    found = []
    for bucket in dataset.buckets:
        first, count = bucket[0].first, sum(segment.count for segment in bucket)
        found += [(first, count, start) for start in range(0, count * quantiles, CHUNK)]
    return found


def chunk(dataset: LatentDataset, quantiles: tuple[float, ...], block: tuple[int, int, int]) -> tuple[list[int], Batch]:
    """The index of each sample's quantile, and the batch, whose samples are of one bucket."""
    first, count, start = block
    pairs = range(start, min(start + CHUNK, count * len(quantiles)))
    rows, indices = [first + pair % count for pair in pairs], [pair // count for pair in pairs]
    quantile = torch.tensor([quantiles[i] for i in indices])
    seeds = [key("validation", row) for row in rows]
    return indices, make_batch(dataset, rows, seeds, range(len(rows)), quantile)


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    denoiser: nn.Module,
    loss_function: LossFunction,
    dataset: LatentDataset,
    quantiles: tuple[float, ...],
    leaving: Callable[[], bool],
) -> dict[str, float] | None:
    """Mean loss per quantile, and their mean as `loss`; None if it was left because `leaving` said so, on all ranks.

    Collective: all ranks take as many chunks, because a sharded denoiser needs all of them; reads the device once.
    """
    sums = torch.zeros(len(quantiles), device=accelerator.device)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    todo = blocks(dataset, len(quantiles))
    denoiser.eval()
    for first in range(0, len(todo), ranks):
        if leaving():
            denoiser.train()
            return None
        mine = first + rank
        indices, batch = chunk(dataset, quantiles, todo[min(mine, len(todo) - 1)])
        with accelerator.autocast():
            losses = loss_function(denoiser, batch.to(accelerator.device))
        if mine < len(todo):
            sums.index_add_(0, torch.tensor(indices, device=sums.device), losses)
    denoiser.train()
    means = (accelerator.reduce(sums, "sum") / len(dataset)).tolist()
    return {"loss": sum(means) / len(means), **{f"quantile_{q:g}": m for q, m in zip(quantiles, means, strict=True)}}
