"""The loss of held-out images at fixed noise and fixed quantiles: comparable between steps and between runs.

It draws nothing from a global generator, so a run with validation takes the very same training steps as one without.
"""

from collections.abc import Iterator
from itertools import islice

import torch
from accelerate import Accelerator
from torch import nn

from data.batches import Batch, make_batch
from data.index import LatentDataset
from data.schedule import key
from training.step import LossFunction

CHUNK = 16  # samples per forward; the same for every run, so that the kernels are too


def chunks(dataset: LatentDataset, quantiles: tuple[float, ...], mine: slice) -> Iterator[tuple[list[int], Batch]]:
    """This rank's part of all (row, quantile) pairs: the index of each sample's quantile, and the batch, whose samples
    are of one bucket."""
    for first, count, start in islice(blocks(dataset, len(quantiles)), mine.start, None, mine.step):
        pairs = range(start, min(start + CHUNK, count * len(quantiles)))
        rows, indices = [first + pair % count for pair in pairs], [pair // count for pair in pairs]
        quantile = torch.tensor([quantiles[i] for i in indices])
        seeds = [key("validation", row) for row in rows]
        yield indices, make_batch(dataset, rows, seeds, range(len(rows)), quantile)


def blocks(dataset: LatentDataset, quantiles: int) -> Iterator[tuple[int, int, int]]:
    """First row and number of rows of each bucket, and where each chunk of its pairs starts."""
    for bucket in dataset.buckets:
        first, count = bucket[0].first, sum(segment.count for segment in bucket)
        yield from ((first, count, start) for start in range(0, count * quantiles, CHUNK))


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    denoiser: nn.Module,
    loss_function: LossFunction,
    dataset: LatentDataset,
    quantiles: tuple[float, ...],
) -> dict[str, float]:
    """Mean loss per quantile, and their mean as `loss`. Collective; reads the device once."""
    sums = torch.zeros(len(quantiles), device=accelerator.device)
    denoiser.eval()
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    for indices, batch in chunks(dataset, quantiles, mine):
        with accelerator.autocast():
            losses = loss_function(denoiser, batch.to(accelerator.device))
        sums.index_add_(0, torch.tensor(indices, device=sums.device), losses)
    denoiser.train()
    means = (accelerator.reduce(sums, "sum") / len(dataset)).tolist()
    return {"loss": sum(means) / len(means), **{f"quantile_{q:g}": m for q, m in zip(quantiles, means, strict=True)}}
