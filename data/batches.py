"""Batches of the training loop, from stored rows. Everything random is drawn here, on the CPU.

Each sample has its own seed, a function of the run's seed and of its visit (schedule.py). The
quantile, caption, dropout and flip come from a hash of the seed (`draw_sample`). The noise comes
from a generator with this seed, in a fixed order: first the noise, then the noise that draws
latents around their mean (data.vae_sampling), then the modifiers of objectives/noise.py. So a
sample does not depend on its batch, the number of processes, or where a run was resumed.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.dataset import LatentDataset, sample_cond
from data.prompts import (
    NEUTRAL,
    Conditioning,
    conditioning_of,
    neutral_text,
    slider_direction,
    slider_prompts,
)
from data.schedule import Schedule, permutation, random_key
from models.controls import without_controls
from objectives.config import ObjectiveConfig
from objectives.noise import modify_noise


@dataclass(frozen=True)
class Batch:
    """One micro-batch: raw `latents` and `noise` (B, C, [F,] h, w), and their conditioning."""

    latents: Tensor
    noise: Tensor
    quantile: Tensor
    """Noise quantiles (B,)."""
    cond: dict[str, Any]
    """Conditioning, batch first."""
    weight: Tensor
    """Factors (B,) on the loss."""
    crop: Tensor
    """The fields (B, 8) of buckets.Crop."""
    visits: range
    """The visits, which name the samples in reports."""
    mask: Tensor | None = None
    """Weights (B, h, w) of the loss in [0, 1], if the data has masks."""
    input_noise: Tensor | None = None
    """The noise that the denoiser sees, if it differs from `noise`."""
    prompts: dict[str, Conditioning] = field(default_factory=dict)
    """Conditioning of other prompts than the captions, by their roles (data/prompts.py)."""
    strength: float = 1.0
    """Strength of the adapter at which the batch trains it."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`. Copies from pinned memory do not wait for the device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with a function applied to all tensors."""
        tensors = map_tensors(function, vars(self))
        cond = {**self.cond, **map_tensors(function, self.cond)}
        prompts = {}
        for role, prompt_cond in self.prompts.items():
            prompts[role] = {**prompt_cond, **map_tensors(function, prompt_cond)}
        return replace(self, **tensors, cond=cond, prompts=prompts)  # type: ignore[arg-type]


def map_tensors(function: Callable[[Tensor], Tensor], values: dict[str, Any]) -> dict[str, Tensor]:
    """Return the result of a function for each tensor among the values.

    Other values are left out."""
    mapped = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            mapped[name] = function(value)
    return mapped


@dataclass(frozen=True)
class SampleDraw:
    """The random numbers of a visit except its noise, each in [0, 1)."""

    quantile: float
    caption: float
    """Position of the caption among the captions of the sample."""
    drop: float
    """The caption is dropped if this is below its dropout probability."""
    flip: float
    """The mirrored image is used if this is below 1/2."""


def draw_sample(seed: int) -> SampleDraw:
    """Return the random numbers of the visit with this seed.

    Each has 24 bits, and so is exact in fp32."""
    seed_bytes = seed.to_bytes(8, "little")
    state = hashlib.blake2b(seed_bytes, digest_size=16)
    words = np.frombuffer(state.digest(), "<u4")
    numbers = (words >> 8) * 2.0**-24
    return SampleDraw(*numbers.tolist())


class MicroBatches:
    """Batches by the number of the micro-batch.

    `per_step` micro-batches, of all processes together, make one step."""

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
        """Return the batch with this number."""
        schedule = self.schedule
        visits = schedule.visits(micro_batch)
        rows = schedule.rows(micro_batch)
        seeds = []
        for visit in visits:
            seeds.append(random_key("sample", schedule.seed, visit))
        options = self.options
        batch = make_batch(self.dataset, rows, seeds, visits, options=options)
        if drops_controls(schedule.seed, visits.start, self.dataset.control_dropout):
            batch = replace(batch, cond=without_controls(batch.cond))
        preserve = options.preserve
        step = micro_batch // self.per_step
        if preserve.weight and step % preserve.every == 0:
            neutral_cond = self._neutral_cond(batch, rows, seeds)
            batch = replace(batch, prompts={NEUTRAL: neutral_cond})
        if options.slider.targets:
            batch = self._with_slider(batch)
        if not options.stratified_timesteps:
            return batch
        quantile = stratify(batch.quantile, schedule, micro_batch, self.per_step)
        return replace(batch, quantile=quantile)

    def _neutral_cond(self, batch: Batch, rows: list[int], seeds: list[int]) -> Conditioning:
        """Return a batch's conditioning with one neutral prompt instead of the captions, or with the
        class instead of the trigger."""
        dataset, options = self.dataset, self.options.preserve
        if options.class_word:
            draws = [draw_sample(seed) for seed in seeds]
            samples = dataset.samples[rows]
            text = gather_text(dataset, rows, samples, draws, of_class=True)
            return {**batch.cond, **text}
        prompt = neutral_text(options, self.schedule.seed, batch.visits.start)
        return conditioning_of(dataset, prompt, len(rows), batch.cond)

    def _with_slider(self, batch: Batch) -> Batch:
        """Return a batch with the prompts and the direction of a slider."""
        options, seed = self.options.slider, self.schedule.seed
        first_visit = batch.visits.start
        prompts = dict(batch.prompts)
        for role, text in slider_prompts(options, seed, first_visit).items():
            prompts[role] = conditioning_of(self.dataset, text, len(batch.visits), batch.cond)
        strength = slider_direction(options, seed, first_visit)
        return replace(batch, prompts=prompts, strength=strength)


def drops_controls(seed: int, first_visit: int, probability: float) -> bool:
    """Return whether a micro-batch is trained without its control images.

    All of its samples are, so that it stays one batch of tensors, and shorter."""
    draw = random_key("control dropout", seed, first_visit) / 2**64
    return draw < probability


def make_batch(
    dataset: LatentDataset,
    rows: list[int],
    seeds: list[int],
    visits: range,
    quantile: Tensor | None = None,
    options: ObjectiveConfig | None = None,
) -> Batch:
    """Return the batch of these rows; everything random in a sample is a function of its seed.

    If `quantile` is given, as in validation, the first caption is used, and nothing is mirrored or
    dropped. `options` may modify the noise."""
    options = options or ObjectiveConfig()
    samples = dataset.samples[rows]
    draws = [draw_sample(seed) for seed in seeds]
    choices = None if quantile is not None else draws
    media = gather_media(dataset, samples, choices)
    cond = gather_text(dataset, rows, samples, choices)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = media["latents"]
    noise = standard_normal(latents.shape, generators)
    if "deviation" in media:
        latents = latents + media["deviation"] * standard_normal(latents.shape, generators)
    noise, input_noise = apply_noise_modifiers(noise, options, generators)
    if quantile is None:
        quantile = torch.tensor([draw.quantile for draw in draws])
    mask = media.get("mask")
    if mask is not None:
        floor = dataset.min_mask_weight
        mask = floor + (1 - floor) * mask
    return Batch(
        latents=latents,
        noise=noise,
        quantile=quantile,
        cond=cond | sample_cond(media),
        weight=torch.from_numpy(samples["weight"].copy()),
        crop=torch.from_numpy(samples["crop"].copy()),
        visits=visits,
        mask=mask,
        input_noise=input_noise,
    )


def gather_media(
    dataset: LatentDataset, samples: np.ndarray, draws: list[SampleDraw] | None
) -> dict[str, Any]:
    """Read the latents and all that is stored with them. Without `draws`, nothing is mirrored."""
    all_ids = samples["media"].tolist()
    chosen_ids = [row_ids[0] for row_ids in all_ids]
    if draws is not None:
        for index, draw in enumerate(draws):
            mirrored_id = all_ids[index][-1]  # the same if images are not mirrored
            if draw.flip < 0.5:
                chosen_ids[index] = mirrored_id
    return dataset.media.read_batch(chosen_ids)


def gather_text(
    dataset: LatentDataset,
    rows: list[int],
    samples: np.ndarray,
    draws: list[SampleDraw] | None,
    of_class: bool = False,
) -> Conditioning:
    """Read the conditioning of the captions. Without `draws`, the first caption is used.

    `of_class`: of the captions with the class instead of the trigger."""
    if draws is None:
        caption_ids = [dataset.caption_id(row) for row in rows]
        return dataset.text.read_batch(caption_ids, dataset.variable_lengths)
    caption_ids = []
    caption_id = dataset.class_caption_id if of_class else dataset.caption_id
    dropouts = samples["caption_dropout"].tolist()
    for row, dropout, draw in zip(rows, dropouts, draws, strict=True):
        if draw.drop < dropout:
            caption_ids.append(dataset.empty_caption)
        else:
            caption_ids.append(caption_id(row, draw.caption))
    return dataset.text.read_batch(caption_ids, dataset.variable_lengths)


def apply_noise_modifiers(
    noise: Tensor, options: ObjectiveConfig, generators: list[torch.Generator]
) -> tuple[Tensor, Tensor | None]:
    """Return the noise with the configured modifiers, and the denoiser's noise if it differs."""
    has_modifiers = options.multires_noise_iterations or options.noise_offset
    if not has_modifiers and not options.input_perturbation:
        return noise, None
    modified = []
    inputs = []
    for sample_noise, generator in zip(noise, generators, strict=True):
        target_noise, input_noise = modify_noise(sample_noise, options, generator)
        modified.append(target_noise)
        inputs.append(input_noise)
    stacked = torch.stack(modified)
    if not options.input_perturbation:
        return stacked, None
    return stacked, torch.stack(inputs)


def standard_normal(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """Draw the next numbers of each sample's generator.

    Drawing the bits takes most of the time of making a batch."""
    noise = torch.empty(shape)
    for sample_noise, generator in zip(noise, generators, strict=True):
        torch.randn(sample_noise.shape, generator=generator, out=sample_noise)
    return noise


def stratify(quantile: Tensor, schedule: Schedule, micro_batch: int, per_step: int) -> Tensor:
    """Return the quantiles (B,) of a micro-batch, spread evenly over the samples of its step.

    The interval (0, 1) has as many equal strata as the step has samples. A permutation, a function
    of seed and step, gives each sample a stratum. The sample's own quantile is its position in it.
    """
    batch_size = schedule.batch_size
    num_samples = per_step * batch_size
    first_sample = micro_batch * batch_size
    step, first = divmod(first_sample, num_samples)
    key = random_key("strata", schedule.seed, step)
    order = permutation(num_samples, key)
    strata = []
    for index in range(len(quantile)):
        strata.append(order[first + index])
    positions = torch.tensor(strata, dtype=torch.float64) + quantile.double()
    stratified = positions / num_samples
    return stratified.float().clamp(max=1 - 2**-24)
