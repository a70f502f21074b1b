"""From stored rows to the batches of the loop; everything random in them is drawn here, on the CPU, by sample visit."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.identity import digest
from data.schedule import Schedule, key
from data.sources import SourceImage
from data.store import Store


@dataclass(frozen=True)
class Batch:
    """One micro-batch: raw `latents` and `noise` (B, C, h, w), `quantile` (B,), `cond` with batch dimension.

    `visits` names the samples in reports.
    """

    latents: Tensor
    noise: Tensor
    quantile: Tensor
    cond: dict[str, Tensor]
    visits: range

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; copies from pinned memory do not wait for the device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> "Batch":
        moved = {
            f.name: function(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }  # fmt: skip
        return replace(self, **moved, cond={name: function(tensor) for name, tensor in self.cond.items()})


class LatentDataset:
    """Encoded images with their captions; rows are read from disk when they are asked for."""

    def __init__(self, images: list[SourceImage], keys: dict[SourceImage, str], media: Store, text: Store):
        self.names = [image.name for image in images]
        self.captions = [image.caption for image in images]
        self.epoch_rows = np.repeat(np.arange(len(images)), [image.repeats for image in images])
        self.keys = [(keys[image], digest(image.caption)) for image in images]
        self.fingerprint = digest(*(f"{m} {t} {i.repeats}" for (m, t), i in zip(self.keys, images, strict=True)))
        self.media, self.text = media, text

    def __len__(self) -> int:
        return len(self.keys)

    def latents(self, row: int) -> Tensor:
        """Raw latents (C, h, w) of one row."""
        return self.media[self.keys[row][0]]["latents"]

    def cond(self, row: int) -> dict[str, Tensor]:
        """Conditioning of one row, without batch dimension."""
        return self.text[self.keys[row][1]]


class MicroBatches(Dataset):
    """Micro-batch number -> Batch."""

    def __init__(self, dataset: LatentDataset, schedule: Schedule):
        self.dataset, self.schedule = dataset, schedule

    def __getitem__(self, micro_batch: int) -> Batch:
        visits = self.schedule.visits(micro_batch)
        rows = [self.schedule.row(visit) for visit in visits]
        seeds = [key("sample", self.schedule.seed, visit) for visit in visits]
        return make_batch(self.dataset, rows, seeds, visits)


def make_batch(
    dataset: LatentDataset, rows: list[int], seeds: list[int], visits: range, quantile: Tensor | None = None
) -> Batch:
    """Collates `rows`; each sample's noise, and its quantile unless given, come from a generator with its own seed."""
    latents = torch.stack([dataset.latents(row) for row in rows])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = torch.cat([torch.rand(1, generator=g) for g in generators])
    noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
    conds = [dataset.cond(row) for row in rows]
    cond = {name: torch.stack([c[name] for c in conds]) for name in conds[0]}
    return Batch(latents, noise, drawn if quantile is None else quantile, cond, visits)


def micro_batches(
    dataset: LatentDataset, schedule: Schedule, numbers: range, num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """The micro-batches `numbers`, in order."""
    loader: DataLoader = DataLoader(
        MicroBatches(dataset, schedule),
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
    return iter(loader)
