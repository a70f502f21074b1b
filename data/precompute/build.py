"""Encodes images and captions once, into stores on disk; a second run encodes nothing, a changed
caption one row.

In turn, on all ranks (turns.py), each stage leaving a file that the next one reads:

    listing   rank 0    every row of every source: names, captions, stamps; no image is opened
    facts     all       size and content hash of each image, which is decoded once to see that it is whole
    plan      rank 0    crops, caption variants, the keys of what is trained on, and which of them are missing
    text      all       the missing captions; then the text encoders are freed
    media     all       the missing images
    index     rank 0    the rows in training order, with the places of all that belongs to them
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from common.errors import DataError, bullet_list, error_list
from data.config import DataConfig, SourceConfig
from data.dataset import LatentDataset, Stores
from data.media import images
from data.media.buckets import Buckets
from data.media.video import Clips
from data.precompute import encode
from data.precompute.index import write_index
from data.precompute.plan import (
    VERSION,
    Planner,
    Sources,
    has_images,
    inspect_share,
    missing,
    short_videos,
    stills,
    write_listing,
    write_rows,
)
from data.precompute.stages import Turns
from data.sources import open_source
from data.sources.encoded import EncodedSource
from data.store import tables
from data.store.hashing import KEY_BYTES, digest, hash_of_files, is_old, key_of
from data.store.store import Store, damaged, discard
from models.base import ModelFamily

MAX_LISTED = 50
DAYS_KEPT = 30  # of an index that no run asks for any more; it is made anew in seconds


@dataclass(frozen=True)
class Datasets:
    """The run's encoded images, how much of them had to be encoded now, and what was left out."""

    train: LatentDataset
    validation: LatentDataset | None
    encoded_images: int
    encoded_captions: int
    skipped: int = 0

    @property
    def several_captions(self) -> bool:
        """Whether visits draw from captions."""
        return len(self.train.arrays["texts"]) > len(self.train)


@dataclass(frozen=True)
class Planned:
    """What there is to train on, before anything is encoded: `work.rows` (tables.ROWS) and
    `work.listing`."""

    work: encode.Work
    stores: Stores
    missing_images: int
    missing_captions: int
    skipped: int


def build_datasets(
    config: DataConfig, family: ModelFamily, accelerator: Accelerator, only_square: bool = False
) -> Datasets:
    """Scans, checks and encodes what `config` names. Raises DataError with all bad files at once.

    All ranks call it together, and every rank returns the same datasets.
    """
    with Build.opened(config, family, accelerator) as build:
        return build.run(only_square)


class Build:
    """One look at the data of a run: its folders, sources and stores."""

    @classmethod
    @contextmanager
    def opened(
        cls, config: DataConfig, family: ModelFamily, accelerator: Accelerator
    ) -> Iterator["Build"]:
        """With a folder for what the stages leave each other, which is removed at the end."""
        turns = Turns(accelerator, Path(config.cache_dir))
        try:
            yield cls(config, family, turns, accelerator)
            turns.close()
        except BaseException as error:
            turns.give_up(error)
            raise

    def __init__(
        self, config: DataConfig, family: ModelFamily, turns: Turns, accelerator: Accelerator
    ):
        self.config, self.family, self.turns, self.accelerator = config, family, turns, accelerator
        self.cache = Path(config.cache_dir)
        self.listing, self.rows = turns.folder / "listing.arrow", turns.folder / "rows.arrow"
        if fault := images.color_fault(config.background):
            raise DataError(f"--data.background: {fault}")
        held_out = () if config.validation_path is None else (SourceConfig(config.validation_path),)
        configs = (*config.all_sources(), *(config.with_defaults(source) for source in held_out))
        self.identities = turns.main(self._identities)
        try:
            opened = tuple(
                open_source(source, config, family, self.identities) for source in configs
            )
        except OSError as error:
            raise DataError(f"the training data cannot be read: {error}") from error
        clips = (
            Clips.wanted(config, family.limits.frame_step, family.limits.fps)
            if family.media == "video"
            else None
        )
        if (fault := family.limits.frame_error(config.frames)) and (
            clips is None or any(s.has_images for s in opened)
        ):
            raise DataError(f"--data.frames {config.frames}: {fault}")
        self.sources = Sources(config, opened, len(configs) - len(held_out), clips)

    def plan(self, only_square: bool) -> "Planned":
        """All but encoding: what there is, what of it is trained on, and what is missing."""
        faults = self.turns.main(lambda: write_listing(self.sources, self.listing))
        bad = self._inspect(faults)
        stores = self._stores()
        planner = Planner(
            self.sources,
            Store(self._facts_folder),
            Buckets.of(self.config, self.family.limits.pixel_step, only_square),
        )
        todo = self.turns.main(lambda: self._plan(planner, bad, stores))
        work = encode.Work(
            planner,
            tables.mapped(self.listing),
            tables.mapped(self.rows),
            self.family,
            self.accelerator.device,
            (self.turns.rank, self.turns.ranks),
        )
        return Planned(work, stores, todo["media"], todo["texts"], len(bad))

    def run(self, only_square: bool) -> Datasets:
        planned = self.plan(only_square)
        work, stores = planned.work, planned.stores
        with encode.noted_if_too_large(self.config):
            self._encode(work, stores)
        self.turns.each(lambda: encode.import_tensors(work, stores))
        indices = self.turns.main(lambda: self._index(stores))
        train, validation = (self._dataset(name, stores) for name in indices)
        assert train is not None
        return Datasets(
            train, validation, planned.missing_images, planned.missing_captions, planned.skipped
        )

    def _encode(self, work: encode.Work, stores: Stores) -> None:
        """Captions, then images, of which each encoder has the device to itself."""
        texts = np.load(self.turns.folder / "texts.npy")
        found = self.turns.each(lambda: encode.encode_texts(work, stores.text, texts))
        number, first = (
            sum(count for count, _ in found),
            [text for _, texts in found for text in texts],
        )
        if number and self.turns.rank == 0:
            print(
                bullet_list(
                    f"{number} captions are longer than the text encoder reads; the end is cut",
                    unique(first),
                    MAX_LISTED,
                )
            )
        self.turns.each(
            lambda: encode.encode_media(
                work, stores.media, np.load(self.turns.folder / "media.npy")
            )
        )

    def _stores(self) -> Stores:
        encoded = [
            source.folder for source in self.sources.opened if isinstance(source, EncodedSource)
        ]
        # families that share encoders need not make the same of them; latents of images are alike
        kind = (self.family.media, *self.family.sample_conditioning)
        of_media = kind if kind != ("image",) else ()
        names = {
            "media": digest(
                VERSION,
                self.config.vae_sampling,
                self.config.masks,
                self.identities["vae"],
                *of_media,
            ),
            "text": digest(VERSION, self.identities["text"], self.family.name),
        }
        folders = {kind: self.cache / f"{kind}-{name}" for kind, name in names.items()}
        self.turns.main(lambda: discard_damaged(folders.values()))
        media, text = (
            Store(own, tuple(folder / kind for folder in encoded)) for kind, own in folders.items()
        )
        return Stores(media, text, self.family.variable_length)

    def _identities(self) -> dict[str, str]:
        family, cache = self.family, self.cache
        hashes = {
            name: hash_of_files(family.identity_files(name), cache) for name in ("vae", "text")
        }
        if family.text_cache_tag:
            hashes["text"] = digest(hashes["text"], family.text_cache_tag)
        return {**hashes, "family": family.name}

    @property
    def _facts_folder(self) -> Path:
        return self.cache / f"facts-{VERSION}"

    def _inspect(self, faults: list[str]) -> set[int]:
        """Looks at all images that are not known; the entries that are skipped."""
        self.turns.main(lambda: discard_damaged([self._facts_folder]))
        share = (self.turns.rank, self.turns.ranks)
        found = self.turns.each(
            lambda: inspect_share(self.sources, self.listing, Store(self._facts_folder), share)
        )
        if wrong := self.family.limits.frame_error(1):
            found.append(
                self.turns.main(
                    lambda: stills(self.sources, self.listing, Store(self._facts_folder), wrong)
                )
            )
        bad = sorted((entry, fault) for part in found for entry, fault in part)
        faults = [*faults, *(fault for _, fault in bad)]
        if faults and (
            self.config.on_error == "fail" or not len(tables.mapped(self.listing)) > len(bad)
        ):
            raise DataError(error_list("the training data", unique(faults), MAX_LISTED))
        if faults and self.turns.rank == 0:
            remain = len(tables.mapped(self.listing)) - len(bad)
            count = "1 error" if len(faults) == 1 else f"{len(faults)} errors"
            heading = f"{count} in the training data; {remain} samples without one remain"
            print(bullet_list(heading, unique(faults), MAX_LISTED))
        return {entry for entry, _ in bad}

    def _plan(self, planner: Planner, bad: set[int], stores: Stores) -> dict[str, int]:
        """Writes the rows, and which of their media and captions are to be encoded; returns how
        many these are."""
        write_rows(planner, self.listing, self.rows, bad)
        rows = tables.mapped(self.rows)
        if short := short_videos(rows, tables.mapped(self.listing), self.sources.clips):
            print(
                bullet_list(
                    f"{len(short)} videos have fewer frames than --data.frames {self.config.frames}",
                    unique(short),
                    MAX_LISTED,
                )
            )
        stores.media.reload()
        stores.text.reload()
        texts = tables.keys(rows.column("texts"))
        if any(value > 0 for value in rows.column("dropout").unique().to_pylist()):
            texts = np.concatenate([texts, np.array([key_of("")], f"S{KEY_BYTES}")])
        with_images = has_images(rows, tables.mapped(self.listing), self.sources)
        of_media = np.repeat(with_images, tables.lengths(rows.column("media")))
        of_texts = np.ones(len(texts), bool)  # the last may be the empty prompt, which is no row's
        owned = np.repeat(with_images, tables.lengths(rows.column("texts")))
        of_texts[: len(owned)] = owned
        todo = {
            "texts": missing(texts, stores.text, of_texts),
            "media": missing(tables.keys(rows.column("media")), stores.media, of_media),
        }
        for name, places in todo.items():
            np.save(self.turns.folder / f"{name}.npy", places)
        return {name: len(places) for name, places in todo.items()}

    def _index(self, stores: Stores) -> list[str | None]:
        """Writes the indices of training and validation, if there is any; returns their names."""
        stores.media.reload()
        stores.text.reload()
        rows = tables.mapped(self.rows)
        train, held_out = self.split(rows)
        names: list[str | None] = []
        for chosen in (train, held_out):
            folder = self.turns.folder / f"index{len(names)}"
            names.append(
                self._keep(folder, write_index(folder, rows, chosen, stores))
                if len(chosen)
                else None
            )
        return names

    def _keep(self, folder: Path, identity: str) -> str:
        """Moves an index and its listing to their place in the cache; returns the name of the
        place."""
        shutil.copy(self.listing, folder / "listing.arrow")
        with self.listing.open("rb") as file:  # other names are another index, though the same data
            names = hashlib.file_digest(file, "sha256").hexdigest()
        name = f"index-{identity}-{digest((folder / 'index.json').read_bytes(), names)[:8]}"
        try:
            folder.rename(self.cache / name)
        except OSError:
            if not (
                self.cache / name / "listing.arrow"
            ).is_file():  # else it is there from an earlier run
                raise
        os.utime(self.cache / name)
        if never := json.loads((self.cache / name / "index.json").read_text(encoding="utf-8"))[
            "never_dropped"
        ]:
            print(
                f"note: {never} samples have conditioning unlike the empty prompt's, and are never shown with it"
            )
        for other in self.cache.glob("index-*"):
            if is_old(other, DAYS_KEPT):
                shutil.rmtree(other, ignore_errors=True)
        return name

    def _dataset(self, name: str | None, stores: Stores) -> LatentDataset | None:
        if name is None:
            return None
        folder = self.cache / name
        about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        stores.media.only_places(about["media_parts"])  # as the index numbers them
        stores.text.only_places(about["text_parts"])
        return LatentDataset(folder, stores, self.config.mask_min_value)

    def split(self, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        """Rows to train on, and rows held out: those of validation sources, and the share of different images with the
        lowest content hash, whatever the seed and the file names, with all their copies."""
        held_out = rows.column("held_out").to_numpy()
        content, every = tables.keys(rows.column("content")), np.arange(len(rows))
        if share := self.config.validation_fraction:
            may = rows.column("may_hold_out").to_numpy() & ~held_out
            different = np.unique(content[may])
            count = max(1, round(share * len(different)))
            if count >= len(different):
                raise DataError(
                    f"--data.validation_fraction {share} of {len(different)} images leaves none to train on"
                )
            held_out = held_out | (may & np.isin(content, different[:count]))
        if held_out.all():
            raise DataError("no image is left to train on")
        both = np.intersect1d(content[held_out], content[~held_out])
        if len(both):
            print(f"note: {len(both)} of the validation images are trained on too")
        return every[~held_out], every[held_out]


def discard_damaged(folders: Iterable[Path]) -> None:
    for folder in folders:
        found = damaged(folder)
        for part in found:
            print(f"{part} is damaged: its rows are encoded again")
        discard(folder, found)


def unique(lines: list[str]) -> list[str]:
    """Return the lines without repetitions, in their order."""
    return list(dict.fromkeys(lines))
