"""The datasets of a run, encoded before training into stores on disk.

A second run encodes nothing, and a changed caption is one new row. The processes take these stages
together (stages.py), and each leaves a file that the next one reads:

    listing    main process    all samples of all sources: names, captions, stamps; opens no image
    facts      all             size and content hash of each image, which is decoded once
    plan       main process    crops, captions and keys of each sample, and what the stores lack
    text       all             the missing captions; then the text encoders are freed
    media      all             the missing images and videos
    import     all             latents and conditioning that sources have already
    index      main process    the samples in training order, with the row ids of their tensors
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.announce import announced
from common.atomic import publish_folder, remove_old
from common.errors import DataError, bullet_list, counted, error_list
from common.hashing import hash_of, hash_of_files, sha256_of_file
from common.process import ProcessInfo
from data.config import DataConfig
from data.dataset import INDEX_FILE, LISTED_FILE, DatasetIndex, LatentDataset, Stores
from data.media import images
from data.media.buckets import Buckets
from data.media.video import ClipSampling
from data.precompute import encode
from data.precompute.controls import ControlKeys, check_options
from data.precompute.encode_captions import caption_advice, encode_captions, long_captions_note
from data.precompute.facts import FactsCache, check_share
from data.precompute.import_tensors import import_tensors
from data.precompute.index import write_index
from data.precompute.plan import (
    MissingCaption,
    MissingMedia,
    Planner,
    PlanTables,
    Split,
    have_images,
    split_samples,
    write_missing_media,
    write_plan,
)
from data.precompute.run_sources import RunSources
from data.precompute.sample_errors import short_videos, unsuited_samples
from data.precompute.stages import Stages
from data.prompts import ExtraPrompts
from data.samples import ListedSample, PlannedSample
from data.sources import open_source
from data.sources.encoded import EncodedSource
from data.store.store import Store, remove_damaged
from data.store.tables import Table
from models.base import ModelFamily

STORE_VERSION = "2"
"""Version of the rows in stores; another version makes all rows be encoded again."""
FACTS_VERSION = "5"
MAX_LISTED = 50
"""Lines of one note."""
MAX_INDEX_DAYS = 30
"""Age at which an index that no run has used is removed. Writing it again takes seconds."""


@dataclass(frozen=True)
class Datasets:
    """The encoded samples of a run, and how many of them had to be encoded or were left out."""

    train: LatentDataset
    validation: LatentDataset | None
    encoded_images: int
    encoded_captions: int
    skipped: int = 0

    @property
    def has_caption_variants(self) -> bool:
        """Return whether samples have several captions, from which visits draw."""
        return len(self.train.caption_ids) > len(self.train)


@dataclass(frozen=True)
class DataPlan:
    """The samples of a run, before anything is encoded."""

    job: encode.EncodeJob
    stores: Stores
    missing_images: int
    missing_captions: int
    skipped: int


def build_datasets(
    config: DataConfig,
    family: ModelFamily,
    process: ProcessInfo,
    only_square: bool = False,
) -> Datasets:
    """List, check and encode the training data; return the same datasets on every process.

    Collective. Raises DataError with all unusable files."""
    with DatasetBuilder.opened(config, family, process) as builder:
        plan = builder.plan(only_square)
        return builder.encode(plan)


class DatasetBuilder:
    """The folders, sources and stores of a run, and the stages of its precomputation."""

    @classmethod
    @contextmanager
    def opened(
        cls, config: DataConfig, family: ModelFamily, process: ProcessInfo
    ) -> "Iterator[DatasetBuilder]":
        """Open the data for a block. The files of the stages are removed at its end."""
        with Stages.opened(process, Path(config.cache_dir)) as stages:
            yield cls(config, family, stages)

    def __init__(self, config: DataConfig, family: ModelFamily, stages: Stages):
        self.config, self.family, self.stages = config, family, stages
        self.process = stages.process
        self.on_progress = encode.ignore_progress
        self.extra_prompts = ExtraPrompts()
        self.cache_dir = Path(config.cache_dir)
        self.listed_path = stages.folder / LISTED_FILE
        self.tables = PlanTables.in_folder(stages.folder)
        color_error = images.color_error(config.background)
        if color_error:
            raise DataError(f"--data.background: {color_error}")
        check_options(config, family)
        self.component_hashes = stages.run_on_main(self._hash_components)
        self.sources = self._open_sources()

    def encode(self, plan: DataPlan, before_encoding: Callable[[], None] | None = None) -> Datasets:
        """Encode everything that is missing; return the datasets. Collective.

        `before_encoding`: called if rows are missing."""
        is_complete = not plan.missing_images and not plan.missing_captions
        if before_encoding is not None and not is_complete:
            before_encoding()
        self._encode(plan)
        self.stages.run_on_all(lambda: import_tensors(plan.job, plan.stores))
        names = self.stages.run_on_main(lambda: self._write_indices(plan.stores))
        train, validation = [self._open_dataset(name, plan.stores) for name in names]
        assert train is not None
        return Datasets(
            train=train,
            validation=validation,
            encoded_images=plan.missing_images,
            encoded_captions=plan.missing_captions,
            skipped=plan.skipped,
        )

    def plan(self, only_square: bool) -> DataPlan:
        """List, check and plan all samples, and encode nothing. Collective."""
        with announced("listing the samples"):
            errors = self.stages.run_on_main(lambda: self.sources.write_listing(self.listed_path))
        with announced("checking the images"):
            unusable = self._check_contents(errors)
        stores = self._open_stores()
        step = self.family.limits.pixel_step
        planner = Planner(
            sources=self.sources,
            facts=FactsCache(self._facts_folder),
            buckets=Buckets.of(self.config, step, only_square),
            controls=ControlKeys.of(self.config, self.family),
            class_word=self.extra_prompts.class_word,
        )
        counts = self.stages.run_on_main(lambda: self._write_plan(planner, unusable, stores))
        job = encode.EncodeJob(
            planner=planner,
            listed=self.open_listed(),
            planned=self.open_planned(),
            family=self.family,
            process=self.process,
            on_progress=self.on_progress,
        )
        return DataPlan(
            job=job,
            stores=stores,
            missing_images=counts["images"],
            missing_captions=counts["captions"],
            skipped=len(unusable),
        )

    def split(self, planned: Table[PlannedSample]) -> Split:
        """Return the samples to train on and those held out. Prints a note if they overlap."""
        split = split_samples(planned, self.config.validation_fraction)
        if split.num_shared:
            images_in_both = counted(split.num_shared, "image")
            print(f"note: training and validation data share {images_in_both}")
        return split

    def open_listed(self) -> Table[ListedSample]:
        return Table(self.listed_path, ListedSample)

    def open_planned(self) -> Table[PlannedSample]:
        return Table(self.tables.planned, PlannedSample)

    @property
    def _facts_folder(self) -> Path:
        return self.cache_dir / f"facts-{FACTS_VERSION}"

    def _hash_components(self) -> dict[str, str]:
        """Return the hashes of everything that decides the encoded rows."""
        hashes = {}
        for name in ("vae", "text"):
            files = self.family.identity_files(name)
            hashes[name] = hash_of_files(files, self.cache_dir)
        cache_tags = {"vae": self.family.media_cache_tag, "text": self.family.text_cache_tag}
        for name, cache_tag in cache_tags.items():
            if cache_tag:
                hashes[name] = hash_of(hashes[name], cache_tag)
        hashes["family"] = self.family.name
        return hashes

    def _open_sources(self) -> RunSources:
        """Open all sources. Raises DataError if the model does not support the number of frames."""
        config, family = self.config, self.family
        configs = list(config.all_sources())
        num_training = len(configs)
        if config.validation_path is not None:
            configs.append(config.validation_source())
        try:
            opened = []
            for source_config in configs:
                opened.append(open_source(source_config, config, family, self.component_hashes))
        except OSError as error:
            raise DataError(f"the training data cannot be read: {error}") from error
        sampling = None
        if family.media == "video":
            sampling = ClipSampling.of(config, family.limits.frame_step, family.limits.fps)
        frames_error = family.limits.frame_error(config.frames)
        if frames_error and (sampling is None or any(source.has_images for source in opened)):
            raise DataError(f"--data.frames {config.frames}: {frames_error}")
        return RunSources(config, tuple(opened), num_training, sampling)

    def _check_contents(self, errors: list[str]) -> set[int]:
        """Check all contents that were not checked yet; return the indices of unusable samples.

        `errors`: those of the listing. Raises DataError if there are errors, unless the samples
        with errors are skipped."""
        self.stages.run_on_main(self._remove_damaged_facts)
        reports = self.stages.run_on_all(self._check_share)
        reports.append(self.stages.run_on_main(self._find_unsuited))
        messages: dict[int, str] = {}
        for report in reports:
            messages |= dict(report)
        content_errors = [messages[index] for index in sorted(messages)]
        errors = list(dict.fromkeys([*errors, *content_errors]))
        num_usable = len(self.open_listed()) - len(messages)
        if errors and (self.config.on_error == "fail" or not num_usable):
            raise DataError(error_list("the training data", errors, MAX_LISTED))
        if errors and self.process.is_main:
            num_errors = counted(len(errors), "error")
            usable = counted(num_usable, "sample")
            heading = f"{num_errors} in the training data, {usable} without errors"
            print(bullet_list(heading, errors, MAX_LISTED))
        return set(messages)

    def _remove_damaged_facts(self) -> None:
        for path in FactsCache(self._facts_folder).remove_damaged():
            print(f"{path} is damaged: its images are checked again")

    def _check_share(self) -> list[tuple[int, str]]:
        """Check this process's share of the contents; return indices and errors."""
        facts = FactsCache(self._facts_folder)
        return check_share(self.sources, self.open_listed(), facts, self.process)

    def _find_unsuited(self) -> list[tuple[int, str]]:
        """Return indices and errors of samples that the model does not take."""
        return unsuited_samples(
            self.sources,
            self.open_listed(),
            self._facts_folder,
            self.family,
        )

    def _open_stores(self) -> Stores:
        """Open the stores whose names follow from everything that decides the encoded rows."""
        family, config = self.family, self.config
        # families that share encoders may use them differently, except for latents of images
        media_kind = (family.media, *family.sample_conditioning)
        if media_kind == ("image",):
            media_kind = ()
        media_hash = hash_of(
            STORE_VERSION,
            config.vae_sampling,
            config.masks,
            self.component_hashes["vae"],
            *media_kind,
        )
        text_hash = hash_of(STORE_VERSION, self.component_hashes["text"], family.name)
        media_folder = self.cache_dir / f"media-{media_hash}"
        text_folder = self.cache_dir / f"text-{text_hash}"
        self.stages.run_on_main(lambda: remove_damaged([media_folder, text_folder]))
        encoded = [source for source in self.sources.opened if isinstance(source, EncodedSource)]
        return Stores(
            media=Store(media_folder, tuple(source.folder / "media" for source in encoded)),
            text=Store(text_folder, tuple(source.folder / "text" for source in encoded)),
            variable_lengths=family.variable_length,
        )

    def _write_plan(self, planner: Planner, unusable: set[int], stores: Stores) -> dict[str, int]:
        """Write the tables of the plan; return how many images and captions have to be encoded."""
        stores.media.reload()
        stores.text.reload()
        listed = self.open_listed()
        write_plan(planner, listed, unusable, stores.text, self.tables, self.extra_prompts.texts)
        planned = self.open_planned()
        sampling = self.sources.clip_sampling
        short = [] if sampling is None else short_videos(planned, listed, sampling)
        if short:
            verb = "has" if len(short) == 1 else "have"
            heading = f"{counted(len(short), 'video')} {verb} fewer frames than --data.frames"
            print(bullet_list(f"{heading} {self.config.frames}", short, MAX_LISTED))
        has_images = have_images(planned, listed, self.sources)
        num_images = write_missing_media(planned, has_images, stores.media, self.tables.media)
        missing_captions = Table(self.tables.captions, MissingCaption)
        num_captions = len(np.unique(missing_captions.keys("key")))
        return {"images": num_images, "captions": num_captions}

    def _encode(self, plan: DataPlan) -> None:
        """Encode captions, then images. Each encoder has the device to itself."""
        missing_captions = Table(self.tables.captions, MissingCaption)
        missing_media = Table(self.tables.media, MissingMedia)
        job, stores = plan.job, plan.stores
        with encode.memory_advice(caption_advice(self.config, self.family.config)):
            reports = self.stages.run_on_all(
                lambda: vars(encode_captions(job, stores.text, missing_captions))
            )
        note = long_captions_note(reports, MAX_LISTED)
        if note and self.process.is_main:
            print(note)
        with encode.memory_advice(encode.media_advice(self.config, self.family.config)):
            self.stages.run_on_all(lambda: encode.encode_media(job, stores.media, missing_media))

    def _write_indices(self, stores: Stores) -> list[str | None]:
        """Write the indices for training and validation; return their names in the cache.

        The name is None if there are no samples for validation."""
        stores.media.reload()
        stores.text.reload()
        planned = self.open_planned()
        split = self.split(planned)
        names: list[str | None] = []
        for rows in (split.train, split.held_out):
            if not len(rows):
                names.append(None)
                continue
            folder = self.stages.folder / f"index{len(names)}"
            content_hash = write_index(
                folder,
                planned,
                rows,
                stores,
                self.extra_prompts.texts,
            )
            names.append(self._keep_index(folder, content_hash))
        remove_old(self.cache_dir.glob("index-*"), MAX_INDEX_DAYS)
        return names

    def _keep_index(self, folder: Path, content_hash: str) -> str:
        """Move an index to its name in the cache, which is returned.

        Other names or captions of the same content are another index."""
        shutil.copy(self.listed_path, folder / LISTED_FILE)
        index_content = (folder / INDEX_FILE).read_bytes()
        details = hash_of(index_content, sha256_of_file(self.listed_path))
        name = f"index-{content_hash}-{details[:8]}"
        target = self.cache_dir / name
        if target.is_dir() and not (target / INDEX_FILE).is_file():  # its removal was interrupted
            shutil.rmtree(target, ignore_errors=True)
        publish_folder(folder, target)
        os.utime(target)  # it is in use
        num_never_dropped = DatasetIndex.load(target).num_never_dropped
        if num_never_dropped:
            print(
                f"note: the conditioning of {counted(num_never_dropped, 'sample')} has another "
                "form than that of the empty prompt, so their captions are never dropped"
            )
        return name

    def _open_dataset(self, name: str | None, stores: Stores) -> LatentDataset | None:
        """Open a dataset by the name of its index."""
        if name is None:
            return None
        folder = self.cache_dir / name
        index = DatasetIndex.load(folder)
        stores.media.use_shards(index.media_shards)
        stores.text.use_shards(index.text_shards)
        return LatentDataset(folder, stores, self.config)
