"""Amount of data that a run with these options will encode and store."""

from dataclasses import dataclass

import numpy as np

from data.config import DataConfig
from data.plan_samples import PlanSamples
from data.precompute.build import DataPlan
from data.precompute.plan import clip_frames, missing_positions
from data.store.store import Store
from data.store.tables import list_owners
from models.base import ModelFamily, cond_bytes

LATENT_BYTES = 4
"""Latents are stored in fp32."""


@dataclass(frozen=True)
class Amount:
    """Numbers of different rows of a store, and of those that are not stored, with their size."""

    num_rows: int
    num_missing: int
    missing_bytes: int

    @property
    def num_stored(self) -> int:
        return self.num_rows - self.num_missing


@dataclass(frozen=True)
class KeyColumn:
    """A column of lists of keys, one list after another."""

    keys: np.ndarray
    owners: np.ndarray
    """For each key, the index of its sample."""

    @classmethod
    def read(cls, plan: DataPlan, name: str) -> "KeyColumn":
        """Read a column of the table of planned samples."""
        planned = plan.job.planned
        return cls(planned.keys(name), owners=list_owners(planned.lengths(name)))

    @property
    def num_different(self) -> int:
        return len(np.unique(self.keys))

    def missing_positions(self, store: Store, are_needed: np.ndarray | None = None) -> np.ndarray:
        """Return a position of each different key that is not in the store.

        `are_needed`: for each key; None: all are."""
        if are_needed is None:
            are_needed = np.ones(len(self.keys), bool)
        return missing_positions(self.keys, store, are_needed)


def latents_amount(plan: DataPlan, samples: PlanSamples, family: ModelFamily) -> Amount:
    """Return the amount of latents, with mirrored ones."""
    media = KeyColumn.read(plan, "media_keys")
    positions = media.missing_positions(plan.stores.media)
    elements = elements_of(plan, samples, family)
    missing_elements = elements[media.owners[positions]]
    num_elements = int(missing_elements.sum())
    return Amount(
        num_rows=media.num_different,
        num_missing=len(positions),
        missing_bytes=num_elements * LATENT_BYTES,
    )


def elements_of(plan: DataPlan, samples: PlanSamples, family: ModelFamily) -> np.ndarray:
    """Return the number of elements that are stored of each sample: of its latents and its mask.

    OUT: (samples,), int64."""
    sizes = samples.bucket_sizes().astype(np.int64)
    latent_sizes = sizes // family.limits.latent_step
    areas = latent_sizes.prod(axis=1)
    num_frames = np.maximum(clip_frames(plan.job.planned), 1)
    num_latent_frames = 1 + (num_frames - 1) // family.limits.frame_step
    elements_per_channel = areas * num_latent_frames
    return elements_per_channel * num_channels(plan.job.config, family)


def num_channels(config: DataConfig, family: ModelFamily) -> int:
    """Return the number of channels that are stored: of the latents, and of the mask."""
    num_latent_channels = family.latent_channels
    if config.vae_sampling == "sample":
        num_latent_channels *= 2  # mean and standard deviation
    if config.masks == "none":
        return num_latent_channels
    return num_latent_channels + 1


def conditioning_amount(plan: DataPlan, family: ModelFamily) -> Amount:
    """Return the amount of conditioning."""
    texts = KeyColumn.read(plan, "caption_keys")
    store = plan.stores.text
    # caption dropout and the objective need other prompts, which are not in this column
    are_captions = plan.job.have_images()[texts.owners]
    num_missing_captions = len(texts.missing_positions(store, are_captions))
    num_other_prompts = plan.missing_captions - num_missing_captions
    num_missing = len(texts.missing_positions(store)) + num_other_prompts
    missing_bytes = 0
    if num_missing:
        missing_bytes = num_missing * cond_bytes(family)
    return Amount(
        num_rows=texts.num_different + num_other_prompts,
        num_missing=num_missing,
        missing_bytes=missing_bytes,
    )
