"""The loss of held-out images at fixed noise and fixed quantiles: comparable between steps and between runs.

It draws nothing from a global generator, so a run with validation takes the very same training steps as one without.
"""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import nn

from data.batches import Batch, LatentDataset, make_batch
from data.schedule import key
from training.step import LossFunction

CHUNK = 16  # samples per forward; the same for every run, so that the kernels are too


def chunks(dataset: LatentDataset, quantiles: tuple[float, ...], mine: slice) -> Iterator[tuple[list[int], Batch]]:
    """This rank's part of all (row, quantile) pairs: the index of each sample's quantile, and the batch."""
    pairs = [(row, i) for i in range(len(quantiles)) for row in range(len(dataset))]
    for start in list(range(0, len(pairs), CHUNK))[mine]:
        rows, indices = zip(*pairs[start : start + CHUNK], strict=True)
        quantile = torch.tensor([quantiles[i] for i in indices])
        seeds = [key("validation", row) for row in rows]
        yield list(indices), make_batch(dataset, list(rows), seeds, range(len(rows)), quantile)


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
