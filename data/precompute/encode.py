"""Runs the text encoders and the VAE over what the stores lack.

Every batch has encode_batch_size rows, filled up if need be, so that the bytes of a row do not
depend on which others happen to be missing, nor on the number of ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common.errors import DataError
from data.config import DataConfig
from data.dataset import Stores
from data.media import images, video
from data.media.buckets import Crop
from data.media.video import Clip
from data.precompute.plan import AHEAD, FEW, Planner, ahead, has_images
from data.store import schema, tables
from data.store.hashing import key_of
from data.store.store import Store
from models.base import ModelFamily

MOST_NAMED, MOST_LETTERS = 20, 100  # of captions that are too long


@dataclass(frozen=True)
class Work:
    """What an encoder is run over, and how: `share` is (rank, ranks)."""

    planner: Planner
    listing: Any
    rows: Any
    family: ModelFamily
    device: torch.device
    share: tuple[int, int]

    @property
    def config(self) -> DataConfig:
        return self.planner.config

    def mine(self, todo: np.ndarray) -> np.ndarray:
        """This rank's part of `todo`: every so many batches."""
        rank, ranks = self.share
        return todo[np.arange(len(todo)) // self.config.encode_batch_size % ranks == rank]

    def has_images(self) -> np.ndarray:
        """Whether each row is an image, or else latents already."""
        return has_images(self.rows, self.listing, self.planner.sources)

    def progress(self, items: Iterator, total: int, what: str) -> Iterator:
        return tqdm(
            items, desc=f"encoding {what}", total=total, disable=self.share[0] != 0 or not total
        )

    def cells(self, rows: np.ndarray) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Cells of rows of the plan, with those of their entries in the listing."""
        for _, row in tables.rows_of(self.rows, rows):
            yield row, self.listing.slice(row["entry"], 1).to_pylist()[0]


@contextmanager
def noted_if_too_large(config: DataConfig) -> Iterator[None]:
    """What does not fit into a GPU's memory in this block says what takes less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        size, ways = config.encode_batch_size, [f"a --data.resolution below {config.resolution}"]
        if size > 1:
            ways.insert(0, f"--data.encode_batch_size {size // 2} (now {size})")
        ways.append("encoding on another machine (train_lora.py export-dataset)")
        error.add_note(f"What takes less memory in encoding: {', or '.join(ways)}")
        raise


def lists_to_rows(lengths: np.ndarray) -> np.ndarray:
    """For lists laid end to end, the row of each item."""
    return np.repeat(np.arange(len(lengths)), lengths)


@torch.no_grad()
def encode_texts(work: Work, store: Store, todo: np.ndarray) -> tuple[int, list[str]]:
    """`todo`: places among all captions of all rows, laid end to end; a place after the last is the empty prompt.
    Returns how many captions are longer than what the encoders see, and the first of them."""
    places = work.mine(todo)
    too_long: list[str] = []
    number = 0
    if not len(places):
        return number, too_long
    counts = tables.lengths(work.rows.column("texts"))
    owner, first = lists_to_rows(counts), tables.starts(counts)
    encoders = work.family.load_encoders("text").to(work.device)
    size = work.config.encode_batch_size

    def captions() -> Iterator[str]:
        here = places[places < len(owner)]
        for place, (row, entry) in zip(here, work.cells(owner[here]), strict=True):
            source = work.planner.sources.opened[entry["source"]].config
            shares = work.planner.shares(entry, source, row["held_out"])
            yield list(shares)[place - first[owner[place]]]
        yield from [""] * (len(places) - len(here))

    def rows() -> Iterator[tuple[bytes, dict[str, Tensor]]]:
        nonlocal number
        for batch in batched(work.progress(captions(), len(places), "captions"), size):
            filled = batch + [""] * (size - len(batch))
            counts, limit = work.family.count_tokens(batch)
            found = [
                text[:MOST_LETTERS]
                for text, count in zip(batch, counts, strict=True)
                if count > limit
            ]
            number += len(found)
            too_long.extend(found[: MOST_NAMED - len(too_long)])
            conds = work.family.encode_prompt(encoders, filled)
            yield from ((key_of(text), cond) for text, cond in zip(batch, conds, strict=False))

    store.write(rows())
    return number, too_long


def batched(items: Iterator, size: int) -> Iterator[list]:
    batch: list = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def import_tensors(work: Work, stores: Stores) -> None:
    """Copies this rank's part of the latents and conditioning that sources have already."""

    def media() -> Iterator[tuple[bytes, dict[str, Tensor]]]:
        for row, latents, cond in to_import(work, stores):
            tensors = {"latents": latents}
            if work.config.vae_sampling == "sample":
                tensors["deviation"] = torch.zeros_like(latents)
            if work.config.masks != "none":
                tensors["mask"] = torch.ones(latents.shape[-2:])
            yield row["media"][0], tensors | {name: cond[name] for name in of_media}

    def texts() -> Iterator[tuple[bytes, dict[str, Tensor]]]:
        for row, _, cond in to_import(work, stores):
            yield (
                row["texts"][0],
                {name: tensor for name, tensor in cond.items() if name not in of_media},
            )

    of_media = work.family.sample_conditioning
    stores.media.write(media())
    stores.text.write(texts())


def to_import(
    work: Work, stores: Stores
) -> Iterator[tuple[dict[str, Any], Tensor, dict[str, Tensor]]]:
    """Rows of the plan with latents and conditioning, of what the stores lack."""
    rank, ranks = work.share
    sources = work.planner.sources.opened
    if all(source.has_images for source in sources):
        return
    for start in range(rank * tables.BATCH, len(work.rows), ranks * tables.BATCH):
        part = np.arange(start, min(start + tables.BATCH, len(work.rows)))
        wanted: dict[int, dict[int, dict[str, Any]]] = {}
        for row, entry in work.cells(part):
            source = sources[entry["source"]]
            there = row["media"][0] in stores.media and row["texts"][0] in stores.text
            if not (source.has_images or there or source.planned(entry["row"]) is not None):
                wanted.setdefault(entry["source"], {})[entry["row"]] = row
        for number, found in wanted.items():
            for row_number, latents, cond in sources[number].tensors(sorted(found)):
                yield found[row_number], latents, cond


@dataclass(frozen=True)
class Picture:
    """An image that is ready to be encoded."""

    key: bytes
    pixels: Tensor
    mask: Tensor | None


@torch.no_grad()
def encode_media(work: Work, store: Store, todo: np.ndarray) -> None:
    """`todo`: places among all media of all rows, laid end to end."""
    places = work.mine(todo)
    if not len(places):
        return
    encoders = work.family.load_encoders("media").to(work.device)
    pending: dict[torch.Size, list[Picture]] = {}

    def rows() -> Iterator[tuple[bytes, dict[str, Tensor]]]:
        most = AHEAD if work.planner.sources.clips is None else FEW
        decoded = ahead(lambda make: make(), decoding(work, places), most)
        for picture in work.progress(decoded, len(places), "images"):
            waiting = pending.setdefault(picture.pixels.shape, [])
            waiting.append(picture)
            if len(waiting) == together(work, picture):
                yield from encoded(work, encoders, pending.pop(picture.pixels.shape))
        for waiting in pending.values():
            yield from encoded(work, encoders, waiting)

    store.write(rows())


def decoding(work: Work, places: np.ndarray) -> Iterator[Any]:
    """A function for each place that makes its Picture, and can run in a thread of its own."""
    counts = tables.lengths(work.rows.column("media"))
    owner, first = lists_to_rows(counts), tables.starts(counts)
    for start in range(0, len(places), tables.BATCH):
        part = places[start : start + tables.BATCH]
        wanted: dict[int, list[tuple[dict[str, Any], bool]]] = {}
        entries: dict[int, dict[str, Any]] = {}
        for place, (row, entry) in zip(part, work.cells(owner[part]), strict=True):
            wanted.setdefault(row["entry"], []).append((row, bool(place - first[owner[place]])))
            entries[row["entry"]] = {**entry, "entry": row["entry"]}
        for entry, content in work.planner.sources.contents(list(entries.values())):
            for row, flip in wanted[entry["entry"]]:
                yield lambda row=row, flip=flip, entry=entry, content=content: picture(
                    work, (row, entry), content, flip
                )


def picture(
    work: Work, given: tuple[dict[str, Any], dict[str, Any]], content: bytes | DataError, flip: bool
) -> Picture:
    row, entry = given
    if isinstance(content, DataError):
        raise DataError(f"{entry['name']}: {content}")
    crop, config, mask, mask_content = Crop(*row["crop"]), work.config, None, b""
    clip = Clip.of(row["clip"]) if row["clip"] else None
    if entry["mask"]:
        with open(entry["mask"], "rb") as file:
            mask_content = file.read()
    key = work.planner.media_key(key_of(content), key_of(mask_content), (crop, clip), flip)
    if key != row["media"][int(flip)]:
        raise DataError(f"{entry['name']}: changed since it was looked at; run again")
    whole = torch.ones(crop.crop_height, crop.crop_width)
    if config.masks == "alpha":
        mask = images.alpha_mask(content, crop, flip) if clip is None else whole
    elif config.masks == "files":
        mask = images.mask_file(mask_content, crop, flip) if entry["mask"] else whole
    return Picture(
        row["media"][int(flip)], pixels_of(content, crop, clip, config.background, flip), mask
    )


def pixels_of(
    content: bytes, crop: Crop, clip: Clip | None, background: str, flip: bool = False
) -> Tensor:
    """Of an image or of a clip of a video: (3, [F,] H, W)."""
    if clip is None:
        return images.pixels(content, crop, background, flip)
    return video.pixels(content, crop, clip, background, flip)


def together(work: Work, picture: Picture) -> int:
    """How many like it are encoded together: videos one by one."""
    return work.config.encode_batch_size if picture.pixels.ndim == 3 else 1


def encoded(
    work: Work, encoders: Any, pictures: list[Picture]
) -> Iterator[tuple[bytes, dict[str, Tensor]]]:
    size = together(work, pictures[0])
    pixels = torch.stack(
        [p.pixels for p in pictures] + [pictures[0].pixels] * (size - len(pictures))
    )
    pixels = pixels.to(work.device)
    mean, deviation = work.family.encode_media(encoders, pixels)
    cond = (
        work.family.encode_sample_conditioning(encoders, pixels)
        if work.family.sample_conditioning
        else {}
    )
    assert cond.keys() == {*work.family.sample_conditioning} - {*schema.MEDIA_TENSORS}, (
        "as the family says, under its own names"
    )
    for i, one in enumerate(pictures):
        tensors = {"latents": mean[i], **{name: tensor[i] for name, tensor in cond.items()}}
        if work.config.vae_sampling == "sample":
            tensors["deviation"] = deviation[i]
        if one.mask is not None:
            tensors["mask"] = F.adaptive_avg_pool2d(
                one.mask[None], (mean.shape[-2], mean.shape[-1])
            )[0]
        yield one.key, tensors
