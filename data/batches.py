"""From stored rows to the batches of the loop; everything random in them is drawn here, on the CPU,
by sample visit."""

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.dataset import LatentDataset
from data.schedule import Schedule, key, permutation
from data.store.schema import MEDIA_TENSORS
from objectives.config import ObjectiveConfig
from objectives.noise import modify_noise


@dataclass(frozen=True)
class Batch:
    """One micro-batch: raw `latents` and `noise` (B, C, [F,] h, w), `quantile` (B,), `cond` with
    batch dimension.

    `weight` (B,): factors on the loss. `mask` (B, h, w) in [0, 1]: where the loss counts, if the data has masks.
    `crop` (B, 8): the fields of buckets.Crop. `visits` names the samples in reports. `input_noise`: the noise that the
    denoiser sees, where it is not `noise`.
    """

    latents: Tensor
    noise: Tensor
    quantile: Tensor
    cond: dict[str, Any]
    weight: Tensor
    crop: Tensor
    visits: range
    mask: Tensor | None = None
    input_noise: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; copies from pinned memory do not wait for the device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> "Batch":
        def moved(values: dict[str, Any]) -> dict[str, Any]:
            return {
                name: function(value) for name, value in values.items() if isinstance(value, Tensor)
            }

        own = moved({f.name: getattr(self, f.name) for f in fields(self)})
        return replace(self, **own, cond=self.cond | moved(self.cond))


@dataclass(frozen=True)
class Drawn:
    """What is random in a sample besides its noise, each in [0, 1)."""

    quantile: float
    caption: float
    drop: float
    flip: float

    @classmethod
    def of(cls, seed: int) -> "Drawn":
        words = np.frombuffer(
            hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=16).digest(), "<u4"
        )
        return cls(*(int(word >> 8) * 2.0**-24 for word in words))  # exact in fp32


class MicroBatches:
    """Micro-batch number -> Batch. `per_step` micro-batches, of all ranks together, make one step."""

    def __init__(
        self,
        dataset: LatentDataset,
        schedule: Schedule,
        options: ObjectiveConfig | None = None,
        per_step: int = 1,
    ):
        self.dataset, self.schedule, self.per_step = dataset, schedule, per_step
        self.options = options or ObjectiveConfig()

    def __getitem__(self, micro_batch: int) -> Batch:
        visits = self.schedule.visits(micro_batch)
        seeds = [key("sample", self.schedule.seed, visit) for visit in visits]
        batch = make_batch(
            self.dataset, self.schedule.rows(micro_batch), seeds, visits, options=self.options
        )
        if not self.options.stratified_timesteps:
            return batch
        return replace(
            batch, quantile=stratified(batch.quantile, self.schedule, micro_batch, self.per_step)
        )


def make_batch(
    dataset: LatentDataset,
    rows: list[int],
    seeds: list[int],
    visits: range,
    quantile: Tensor | None = None,
    options: ObjectiveConfig | None = None,
) -> Batch:
    """Collates `rows`; each sample's noise, caption and flip, and its quantile unless given, are functions of its own
    seed. With `quantile` given (validation), the first caption is taken and nothing is mirrored or dropped. `options`
    may ask for noise that is not standard normal."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = [Drawn.of(seed) for seed in seeds]
    fixed = quantile is not None
    of_row = {
        name: np.asarray(dataset.arrays[name])[rows]
        for name in ("media", "dropout", "weight", "crop")
    }
    turns = [
        0 if fixed or len(p) == 1 else int(d.flip < 0.5)
        for p, d in zip(of_row["media"], drawn, strict=True)
    ]
    media = dataset.media.rows(p.item(turn) for p, turn in zip(of_row["media"], turns, strict=True))
    latents = media["latents"]
    noise = standard_normal(latents.shape, generators)
    if "deviation" in media:
        latents = latents + media["deviation"] * standard_normal(latents.shape, generators)
    noise, input_noise = altered_noise(noise, options or ObjectiveConfig(), generators)
    dropout = [0.0] * len(rows) if fixed else of_row["dropout"].tolist()
    texts = [
        dataset.empty_text if d.drop < share else dataset.text_of(row, None if fixed else d.caption)
        for row, share, d in zip(rows, dropout, drawn, strict=True)
    ]
    cond = dataset.text.rows(texts, dataset.ragged)
    cond |= {name: tensor for name, tensor in media.items() if name not in MEDIA_TENSORS}
    return Batch(
        latents,
        noise,
        torch.tensor([d.quantile for d in drawn]) if quantile is None else quantile,
        cond,
        torch.from_numpy(of_row["weight"]),
        torch.from_numpy(of_row["crop"]),
        visits,
        dataset.mask_floor + (1 - dataset.mask_floor) * media["mask"] if "mask" in media else None,
        input_noise,
    )


def altered_noise(
    noise: Tensor, options: ObjectiveConfig, generators: list[torch.Generator]
) -> tuple[Tensor, Tensor | None]:
    """The noise of a batch as `options` ask, and what the denoiser sees in its place, if that is
    not the same."""
    if not (
        options.multires_noise_iterations or options.noise_offset or options.input_perturbation
    ):
        return noise, None
    both = [
        modify_noise(one, options, generator)
        for one, generator in zip(noise, generators, strict=True)
    ]
    noise, seen = (torch.stack(tensors) for tensors in zip(*both, strict=True))
    return noise, seen if options.input_perturbation else None


def standard_normal(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """The next numbers of each sample's generator. Drawing the bits takes most of the loader's
    time."""
    batch = torch.empty(shape)
    for one, generator in zip(batch, generators, strict=True):
        torch.randn(one.shape, generator=generator, out=one)
    return batch


def stratified(quantile: Tensor, schedule: Schedule, micro_batch: int, per_step: int) -> Tensor:
    """The quantiles (B,) of a micro-batch, spread evenly over the `per_step` micro-batches of its
    step.

    The interval (0, 1) has as many equal parts as the step has samples, and each sample one of them: a permutation of
    the places in the step, a function of seed and step. Where in its part a sample lies, its own `quantile` says.
    """
    samples = per_step * schedule.batch_size
    step, place = divmod(micro_batch * schedule.batch_size, samples)
    strata = permutation(samples, key("strata", schedule.seed, step))
    parts = torch.tensor([strata[place + i] for i in range(len(quantile))], dtype=torch.float64)
    return ((parts + quantile.double()) / samples).float().clamp(max=1 - 2**-24)
