"""The plan: for each listed sample, how it is trained on, and what has to be encoded for that."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import DataError
from data.config import SourceConfig
from data.media.buckets import Buckets, Crop
from data.media.captions import Variants, caption_variants, trigger_of, with_class, with_trigger
from data.media.video import Clip
from data.precompute.controls import ContentHashes, ControlKeys
from data.precompute.facts import FactsCache, MediaFacts, facts_key
from data.precompute.run_sources import RunSources
from data.precompute.streams import batched
from data.samples import ListedSample, PlannedSample, media_keys
from data.store.keys import key_array, key_of
from data.store.store import MISSING, Store
from data.store.tables import ROWS_PER_BATCH, Int64, Table, TableWriter, new_table

WITHOUT_IMAGES = -1
"""In the place of a sample: the text encoder sees a caption alone."""


@dataclass(frozen=True)
class MissingCaption:
    """A caption whose conditioning has to be encoded."""

    key: bytes
    text: str
    listed: Int64 = WITHOUT_IMAGES
    """Index of the listed sample whose control images the text encoder sees."""


@dataclass(frozen=True)
class MissingMedia:
    """A planned sample whose latents have to be encoded."""

    planned: int
    """Index in the table of planned samples."""
    flips: list[bool]
    """Orientations that have to be encoded: false for the original, true for the mirrored image."""


class PlannedRows(NamedTuple):
    """The planned samples of one listed sample, and their captions by key.

    Stored conditioning has no captions."""

    samples: list[PlannedSample]
    captions: dict[bytes, MissingCaption]


class Planner:
    """Makes planned samples from a listed sample: one, or one for each clip of a video."""

    def __init__(
        self,
        sources: RunSources,
        facts: FactsCache,
        buckets: Buckets,
        controls: ControlKeys,
        class_word: str = "",
    ):
        """`class_word`: see ExtraPrompts."""
        self.sources, self.facts, self.buckets = sources, facts, buckets
        self.controls, self.class_word = controls, class_word
        self.config = sources.config

    def plan(self, index: int, sample: ListedSample) -> PlannedRows:
        """Return the planned samples of the listed sample with this index."""
        source = self.sources.source_of(sample)
        if source.has_images:
            rows = self._plan_media(index, sample)
        elif source.is_planned:
            rows = PlannedRows([source.planned(sample.row)], {})
        else:
            rows = PlannedRows([self._plan_tensors(index, sample)], {})
        samples = []
        for planned in rows.samples:
            if self.class_word and not planned.class_caption_keys:
                self._check_replaceable(source.config, sample)
                planned = replace(planned, class_caption_keys=planned.caption_keys)
            samples.append(self._with_options(index, sample, planned))
        return rows._replace(samples=samples)

    def _check_replaceable(self, config: SourceConfig, sample: ListedSample) -> None:
        """Raise DataError if the captions of a sample have a trigger, and are encoded already."""
        if self._is_held_out(sample) or not trigger_of(config):
            return
        raise DataError(
            f"--objective.preserve.class_word {self.class_word}: the captions of {config.path} are "
            "encoded already, so the trigger in them cannot be replaced. Use "
            "--objective.preserve.prompts"
        )

    def media_key(self, hashes: ContentHashes, crop: Crop, clip: Clip | None, flip: bool) -> bytes:
        """Return the key of the latents of a content: a hash of all that decides them."""
        masks = self.config.masks
        contents: list[str | bytes] = [
            hashes.content,
            crop.describe(),
            "mirrored" if flip else "",
            self.config.background,
            hashes.mask.hex() if masks == "files" else masks,
        ]
        if clip is not None:
            contents.append(clip.describe())
        return key_of(*contents, *self.controls.media_contents(hashes))

    def _plan_media(self, index: int, sample: ListedSample) -> PlannedRows:
        """Plan an image, or each clip of a video."""
        has_videos = self.sources.clip_sampling is not None
        facts = self.facts[facts_key(sample, has_videos)]
        crop = self.buckets.crop(facts.width, facts.height)
        hashes = facts.hashes
        variants = self._variants(sample)
        listed = index if self.controls.seen_with_caption(hashes) else WITHOUT_IMAGES
        captions = {}
        for text in variants:
            key = self.controls.caption_key(text, hashes)
            captions[key] = MissingCaption(key, text, listed)
        class_captions = self._class_captions(variants, sample)
        samples = []
        for clip in self._clips(facts):
            keys = []
            for flip in self._flips(sample):
                keys.append(self.media_key(hashes, crop, clip, flip))
            planned = PlannedSample(
                listed=index,
                content_hash=facts.content_hash,
                media_keys=keys,
                caption_keys=list(captions),
                caption_probabilities=list(variants.values()),
                class_caption_keys=[caption.key for caption in class_captions],
                crop=crop,
                clip=clip,
            )
            samples.append(planned)
        for caption in class_captions:
            captions[caption.key] = caption
        return PlannedRows(samples, captions)

    def _class_captions(self, variants: Variants, sample: ListedSample) -> list[MissingCaption]:
        """Return each caption of a sample with the class instead of the trigger, if that is used."""
        if not self.class_word or self._is_held_out(sample):
            return []
        config = self.sources.config_of(sample)
        captions = []
        for text in variants:
            class_text = with_class(text, config, self.class_word)
            captions.append(MissingCaption(key_of(class_text), class_text))
        return captions

    def _plan_tensors(self, index: int, sample: ListedSample) -> PlannedSample:
        """Plan latents and conditioning that are used unchanged."""
        width, height = sample.width, sample.height
        content_hash = key_of("tensors", sample.stamp)
        media_key = key_of("latents", content_hash, self.config.masks)
        num_orientations = 2 if self.config.random_flip else 1
        return PlannedSample(
            listed=index,
            content_hash=content_hash,
            media_keys=[media_key] * num_orientations,
            caption_keys=[key_of("cond", content_hash)],
            caption_probabilities=[1.0],
            crop=Crop(width, height, width, height, 0, 0, width, height),
        )

    def _with_options(
        self, index: int, sample: ListedSample, planned: PlannedSample
    ) -> PlannedSample:
        """Return a planned sample with the options of its source."""
        config = self.sources.config_of(sample)
        prior_weight = self.config.prior_loss_weight if config.regularization else 1.0
        is_held_out = planned.is_held_out or self._is_held_out(sample)
        can_be_held_out = planned.can_be_held_out and not config.regularization
        # the empty prompt of a model whose text encoder sees images is one of its captions
        can_drop_caption = (
            can_be_held_out and not is_held_out and not self.controls.limits.is_seen_by_text_encoder
        )
        return replace(
            planned,
            listed=index,
            repeats=sample.repeats,
            weight=planned.weight * sample.weight * config.weight * prior_weight,
            caption_dropout=config.captions.dropout if can_drop_caption else 0.0,
            is_held_out=is_held_out,
            can_be_held_out=can_be_held_out,
        )

    def _is_held_out(self, sample: ListedSample) -> bool:
        return sample.source >= self.sources.first_held_out

    def _clips(self, facts: MediaFacts) -> Sequence[Clip | None]:
        """Return the clips of a video; None for an image."""
        sampling = self.sources.clip_sampling
        if sampling is None or facts.seconds is None:
            return [None]
        return sampling.clips(facts.seconds)

    def _flips(self, sample: ListedSample) -> list[bool]:
        """Return the orientations of a sample.

        Held-out samples are never mirrored, but all samples have equally many orientations."""
        if not self.config.random_flip:
            return [False]
        return [False, not self._is_held_out(sample)]

    def _variants(self, sample: ListedSample) -> Variants:
        """Return the captions of a sample, and their probabilities.

        Held-out samples have one that never changes, because nothing is drawn in validation."""
        config = self.sources.config_of(sample)
        if self._is_held_out(sample):
            return {with_trigger(sample.captions[0], config): 1.0}
        variants = caption_variants(sample.captions, config)
        if self.controls.limits.is_seen_by_text_encoder and not config.regularization:
            variants = with_empty_caption(variants, config.captions.dropout)
        return variants


def with_empty_caption(variants: Variants, probability: float) -> Variants:
    """Return captions with the empty one, which has this probability."""
    if not probability:
        return variants
    scaled = {text: share * (1 - probability) for text, share in variants.items()}
    scaled[""] = scaled.get("", 0.0) + probability
    return scaled


@dataclass(frozen=True)
class PlanTables:
    """Paths of the tables of a plan."""

    planned: Path
    captions: Path
    """Captions that the text store lacks; some may be there several times."""
    media: Path
    """Samples whose latents the media store lacks."""

    @classmethod
    def in_folder(cls, folder: Path) -> "PlanTables":
        return cls(
            planned=folder / "planned.arrow",
            captions=folder / "missing_captions.arrow",
            media=folder / "missing_media.arrow",
        )


def write_plan(
    planner: Planner,
    listed: Table[ListedSample],
    unusable: set[int],
    text: Store,
    tables: PlanTables,
    extra_prompts: Sequence[str] = (),
) -> None:
    """Write the planned samples, and the captions that the text store lacks.

    `unusable`: indices of listed samples that are left out. `extra_prompts`: are encoded too."""
    with (
        new_table(tables.planned, PlannedSample) as planned,
        new_table(tables.captions, MissingCaption) as missing_captions,
    ):
        uses_dropout = False
        for batch in batched(listed.rows(), ROWS_PER_BATCH):
            captions: dict[bytes, MissingCaption] = {}
            for index, sample in batch:
                if index in unusable:
                    continue
                rows = planner.plan(index, sample)
                captions |= rows.captions
                for planned_sample in rows.samples:
                    planned.add(planned_sample)
                    uses_dropout |= planned_sample.caption_dropout > 0
            add_missing_captions(captions, text, missing_captions)
        prompts = {*extra_prompts, ""} if uses_dropout else {*extra_prompts}
        captions_alone = {}
        for prompt in sorted(prompts):
            key = key_of(prompt)
            captions_alone[key] = MissingCaption(key, prompt)
        add_missing_captions(captions_alone, text, missing_captions)


def add_missing_captions(
    captions: dict[bytes, MissingCaption], text: Store, table: TableWriter[MissingCaption]
) -> None:
    """Add the captions that the text store lacks to a table."""
    row_ids = text.find(key_array(list(captions)))
    for caption, row_id in zip(captions.values(), row_ids.tolist(), strict=True):
        if row_id == MISSING:
            table.add(caption)


def write_missing_media(
    planned: Table[PlannedSample], has_images: np.ndarray, media: Store, path: Path
) -> int:
    """Write the samples whose latents the media store lacks; return the number of latents.

    `has_images`: whether each planned sample is encoded, or has latents already."""
    keys = media_keys(planned)
    num_orientations = keys.shape[1]
    is_encoded = np.repeat(has_images, num_orientations)
    positions = missing_positions(keys.reshape(-1), media, is_encoded)
    samples, orientations = np.divmod(positions, num_orientations)
    with new_table(path, MissingMedia) as table:
        pairs = zip(samples.tolist(), orientations.tolist(), strict=True)
        for sample, group in groupby(pairs, key=itemgetter(0)):
            flips = [bool(orientation) for _, orientation in group]
            table.add(MissingMedia(sample, flips))
    return len(positions)


def missing_positions(keys: np.ndarray, store: Store, is_needed: np.ndarray) -> np.ndarray:
    """Return the positions of needed keys that a store lacks, ascending, one for each key."""
    is_missing = (store.find(keys) == MISSING) & is_needed
    positions = np.flatnonzero(is_missing)
    first = first_occurrences(keys[positions])
    return positions[first]


def first_occurrences(keys: np.ndarray) -> np.ndarray:
    """Return the first position of each different key, ascending."""
    _, first = np.unique(keys, return_index=True)
    return np.sort(first)


def have_images(
    planned: Table[PlannedSample], listed: Table[ListedSample], sources: RunSources
) -> np.ndarray:
    """Return whether each planned sample is an image or a clip, or has latents already."""
    source_numbers = listed.column("source")
    return sources.have_images(source_numbers[planned.column("listed")])


def clip_frames(planned: Table[PlannedSample]) -> np.ndarray:
    """Return the number of frames of each sample that is a clip; 0 of others."""
    frames = planned.nested_column("clip", "frames")
    frames[planned.is_none("clip")] = 0
    return frames


class Split(NamedTuple):
    """Indices of the planned samples to train on, and of those that are held out."""

    train: np.ndarray
    held_out: np.ndarray
    num_shared: int
    """Number of different contents in both."""


def split_samples(planned: Table[PlannedSample], fraction: float) -> Split:
    """Return the samples to train on, and the samples of validation sources.

    With a `fraction`, the different images with the lowest content hash are held out too, with all
    their copies. Neither the seed nor file names matter."""
    is_held_out = planned.column("is_held_out")
    contents = planned.keys("content_hash")
    if fraction:
        is_candidate = planned.column("can_be_held_out") & ~is_held_out
        images = np.unique(contents[is_candidate])
        count = max(1, round(fraction * len(images)))
        if count >= len(images):
            raise DataError(
                f"--data.validation_fraction {fraction}: leaves none of {len(images)} images for "
                "training. Use a smaller fraction"
            )
        is_chosen = is_candidate & np.isin(contents, images[:count])
        is_held_out = is_held_out | is_chosen
    if is_held_out.all():
        raise DataError("no image is left to train on")
    shared = np.intersect1d(contents[is_held_out], contents[~is_held_out])
    return Split(np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out), len(shared))
