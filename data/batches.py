"""From stored rows to the batches of the loop; everything random in them is drawn here, on the CPU, by sample visit."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.index import LatentDataset
from data.schedule import Schedule, key


@dataclass(frozen=True)
class Batch:
    """One micro-batch: raw `latents` and `noise` (B, C, h, w), `quantile` (B,), `cond` with batch dimension.

    `weight` (B,): factors on the loss. `mask` (B, h, w) in [0, 1]: where the loss counts, if the data has masks.
    `crop` (B, 8): the fields of buckets.Crop. `visits` names the samples in reports.
    """

    latents: Tensor
    noise: Tensor
    quantile: Tensor
    cond: dict[str, Tensor]
    weight: Tensor
    crop: Tensor
    visits: range
    mask: Tensor | None = None

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


@dataclass(frozen=True)
class Drawn:
    """What is random in a sample, in the order in which its generator gives it."""

    quantile: Tensor
    caption: float
    drop: float
    flip: float

    @classmethod
    def of(cls, generator: torch.Generator) -> "Drawn":
        quantile, *others = torch.rand(4, generator=generator)
        return cls(quantile, *(float(other) for other in others))


class MicroBatches(Dataset):
    """Micro-batch number -> Batch."""

    def __init__(self, dataset: LatentDataset, schedule: Schedule):
        self.dataset, self.schedule = dataset, schedule

    def __getitem__(self, micro_batch: int) -> Batch:
        visits = self.schedule.visits(micro_batch)
        seeds = [key("sample", self.schedule.seed, visit) for visit in visits]
        return make_batch(self.dataset, self.schedule.rows(micro_batch), seeds, visits)


def make_batch(
    dataset: LatentDataset, rows: list[int], seeds: list[int], visits: range, quantile: Tensor | None = None
) -> Batch:
    """Collates `rows`; each sample's noise, caption and flip, and its quantile unless given, come from a generator with
    its own seed. With `quantile` given (validation), the first caption is taken and nothing is mirrored or dropped."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = [Drawn.of(generator) for generator in generators]
    fixed = quantile is not None
    places = dataset.arrays["media"][rows]
    flips = [0 if fixed or p.shape[0] == 1 else int(d.flip < 0.5) for p, d in zip(places, drawn, strict=True)]
    media = [int(p[flip]) for p, flip in zip(places, flips, strict=True)]
    latents = dataset.media.stacked(media, "latents")
    noise = torch.empty(latents.shape)
    for one, generator in zip(noise, generators, strict=True):
        torch.randn(one.shape, generator=generator, out=one)
    columns = dataset.media.columns(media[0])
    if "deviation" in columns:
        latents = sampled(latents, dataset.media.stacked(media, "deviation"), generators)
    texts = [text_place(dataset, row, d, fixed) for row, d in zip(rows, drawn, strict=True)]
    return Batch(
        latents,
        noise,
        torch.stack([d.quantile for d in drawn]) if quantile is None else quantile,
        {name: dataset.text.stacked(texts, name) for name in dataset.text.columns(texts[0])},
        torch.from_numpy(np.array(dataset.arrays["weight"][rows])),
        torch.from_numpy(np.array(dataset.arrays["crop"][rows])),
        visits,
        masks(dataset, media) if "mask" in columns else None,
    )


def masks(dataset: LatentDataset, media: list[int]) -> Tensor:
    floor = dataset.mask_floor
    return floor + (1 - floor) * dataset.media.stacked(media, "mask")


def sampled(mean: Tensor, deviation: Tensor, generators: list[torch.Generator]) -> Tensor:
    draws = [torch.randn(mean.shape[1:], generator=generator) for generator in generators]
    return mean + deviation * torch.stack(draws)


def text_place(dataset: LatentDataset, row: int, drawn: Drawn, fixed: bool) -> int:
    if not fixed and drawn.drop < dataset.arrays["dropout"][row]:
        return dataset.empty_text
    return dataset.text_of(row, 0.0 if fixed else drawn.caption)


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
