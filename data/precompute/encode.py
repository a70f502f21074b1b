"""The encoding of everything that the stores lack, and the VAE's part in it.

Captions are encoded in encode_captions.py.

All batches of an encoder have the same size, and are filled up if necessary. So the bytes of a row
do not depend on the other missing rows, nor on the number of processes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common.announce import announced
from common.errors import DataError
from common.process import ProcessInfo
from data.config import DataConfig
from data.media import images, video
from data.media.buckets import Crop
from data.media.video import Clip
from data.precompute.controls import (
    ContentHashes,
    control_images,
    encode_controls,
)
from data.precompute.facts import read_mask
from data.precompute.plan import (
    MissingMedia,
    Planner,
    have_images,
)
from data.precompute.run_sources import ListedContent
from data.precompute.streams import batched, map_ahead
from data.samples import ListedSample, PlannedSample
from data.store.keys import key_of
from data.store.schema import MEDIA_TENSORS
from data.store.store import Store, StoreWriter
from data.store.tables import ROWS_PER_BATCH, Table
from models.base import ModelFamily
from models.config import ModelConfig

OTHER_MACHINE = "encoding on another machine (train_lora.py export-dataset)"
Item = TypeVar("Item")


ProgressCallback = Callable[[str, int, int], None]
"""Is called with what is encoded, how many of them are done by this process, and how many there are."""


def ignore_progress(noun: str, done: int, total: int) -> None:
    """Take no notice of the progress."""


@dataclass(frozen=True)
class EncodeJob:
    """The samples of a plan, and the model and the process that encode them."""

    planner: Planner
    listed: Table[ListedSample]
    planned: Table[PlannedSample]
    family: ModelFamily
    process: ProcessInfo
    on_progress: ProgressCallback = ignore_progress

    @property
    def config(self) -> DataConfig:
        return self.planner.config

    @property
    def device(self) -> torch.device:
        return self.process.device

    def own_share(self, indices: np.ndarray) -> np.ndarray:
        """Return the indices that this process encodes.

        The processes take turns, batch by batch."""
        positions = np.arange(len(indices))
        batch_numbers = positions // self.config.encode_batch_size
        process_indices = batch_numbers % self.process.count
        is_own = process_indices == self.process.index
        return indices[is_own]

    def have_images(self) -> np.ndarray:
        """Return whether each planned sample is an image or a clip, or has latents already."""
        return have_images(self.planned, self.listed, self.planner.sources)

    def own_blocks(self) -> Iterator[np.ndarray]:
        """Yield the indices of planned samples in blocks.

        The processes take turns, block by block."""
        num_samples = len(self.planned)
        all_indices = np.arange(num_samples)
        starts = range(0, num_samples, ROWS_PER_BATCH)
        for number, start in enumerate(starts):
            if number % self.process.count == self.process.index:
                end = start + ROWS_PER_BATCH
                yield all_indices[start:end]

    def samples(self, indices: np.ndarray) -> Iterator[tuple[PlannedSample, ListedSample]]:
        """Yield the planned samples with these indices, and their listed samples.

        All planned samples are in memory at a time."""
        planned_samples = []
        listed_indices = []
        for _, planned in self.planned.rows(indices):
            planned_samples.append(planned)
            listed_indices.append(planned.listed)
        index_array = np.array(listed_indices)
        listed_rows = self.listed.rows(index_array)
        for planned, (_, listed) in zip(planned_samples, listed_rows, strict=True):
            yield planned, listed

    def progress(self, items: Iterable[Item], total: int, noun: str) -> Iterator[Item]:
        """Yield items, and show the progress on the main process."""
        is_main = self.process.is_main
        bar = tqdm(
            items,
            desc=f"encoding {noun}",
            total=total,
            disable=not is_main or not total,
        )
        for number, item in enumerate(bar):
            self.on_progress(noun, number, total)
            yield item


@contextmanager
def memory_advice(advice: list[str]) -> Iterator[None]:
    """Add to an out-of-memory error of the block how encoding takes less memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.has_advice = True  # type: ignore[attr-defined]
        error.add_note(f"To use less memory in encoding, try {', or '.join(advice)}")
        raise


def media_advice(config: DataConfig, model: ModelConfig) -> list[str]:
    """Return options with which images and videos take less memory."""
    pixels_of_one_image = config.resolution**2
    advice = []
    if config.encode_pixels > pixels_of_one_image and config.encode_batch_size > 1:
        advice.append(f"--data.encode_pixels {pixels_of_one_image} (now {config.encode_pixels})")
    if model.vae_dtype == "fp32":
        advice.append("--model.vae_dtype bf16")
    if not model.vae_tiling:
        advice.append("--model.vae_tiling")
    return [*advice, f"a --data.resolution below {config.resolution}", OTHER_MACHINE]


class MediaView(NamedTuple):
    """One orientation of a planned sample."""

    planned: PlannedSample
    flip: bool


class MediaTask(NamedTuple):
    """A view that has to be encoded, and the content of its file."""

    view: MediaView
    file: ListedContent


@dataclass(frozen=True)
class PreparedMedia:
    """Pixels (3, [F,] H, W), mask (H, W) and control images that are ready to be encoded."""

    key: bytes
    pixels: Tensor
    mask: Tensor | None
    controls: tuple[bytes, ...]
    """Contents of the control images."""
    flip: bool


@torch.no_grad()
def encode_media(job: EncodeJob, store: Store, missing: Table[MissingMedia]) -> None:
    """Encode this process's share of the missing latents."""
    share = job.own_share(np.arange(len(missing)))
    if not len(share):
        return
    with announced("loading the VAE"):
        encoders = job.family.load_encoders("media").to(job.device)
    num_flips = missing.lengths("flips")
    num_tasks = int(num_flips[share].sum())
    tasks = media_tasks(job, missing, share)
    prepare = partial(prepare_media, job)
    prepared = map_ahead(prepare, tasks, job.planner.sources.num_ahead)
    waiting: dict[torch.Size, list[PreparedMedia]] = {}
    with store.writer() as writer:
        for media in job.progress(prepared, num_tasks, "images"):
            shape = media.pixels.shape
            batch = waiting.setdefault(shape, [])
            batch.append(media)
            if len(batch) == media_batch_size(job.config, shape):
                encode_batch(job, encoders, waiting.pop(shape), writer)
        for batch in waiting.values():
            encode_batch(job, encoders, batch, writer)


def media_tasks(
    job: EncodeJob, missing: Table[MissingMedia], share: np.ndarray
) -> Iterator[MediaTask]:
    """Yield a task for everything that is missing.

    A file is read once for its orientations and neighboring clips."""
    sources = job.planner.sources
    for batch in batched(missing.rows(share), ROWS_PER_BATCH):
        flips = {media.planned: media.flips for _, media in batch}
        planned_indices = np.array(list(flips))
        views: dict[int, list[MediaView]] = {}
        for index, planned in job.planned.rows(planned_indices):
            views_of_listed = views.setdefault(planned.listed, [])
            for flip in flips[index]:
                view = MediaView(planned, flip)
                views_of_listed.append(view)
        listed_indices = np.array(list(views))
        for file in sources.contents(job.listed.rows(listed_indices)):
            for view in views[file.listed]:
                yield MediaTask(view, file)


def prepare_media(job: EncodeJob, task: MediaTask) -> PreparedMedia:
    """Decode pixels and mask. Raises DataError if the file changed after it was checked."""
    (planned, flip), (_, sample, content, controls) = task
    if isinstance(content, DataError):
        raise DataError(f"{sample.name}: {content}")
    crop, clip = planned.crop, planned.clip
    mask_content = read_mask(sample)
    hashes = ContentHashes(
        content=key_of(content),
        mask=key_of(mask_content),
        controls=key_of(*controls),
    )
    key = job.planner.media_key(hashes, crop, clip, flip)
    if key != planned.media_keys[int(flip)]:
        raise DataError(changed_message(sample.name))
    background: str | None = job.config.background
    if job.family.paints_masks and job.config.masks == "alpha":
        background = None  # the colors of transparent pixels surround what is painted
    pixels = decode_pixels(content, crop, clip, background, flip)
    mask = None
    if job.config.masks != "none":
        mask = torch.ones(crop.crop_height, crop.crop_width)
    if job.config.masks == "alpha" and clip is None:
        mask = images.alpha_mask(content, crop, flip)
    if job.config.masks == "files" and mask_content:
        mask = images.mask_file(mask_content, crop, flip)
    return PreparedMedia(key, pixels, mask, controls, flip)


def changed_message(name: str) -> str:
    """Return the error of a sample whose files differ from those that were checked."""
    return f"{name}: has changed since it was checked. Run the command again"


def decode_pixels(
    content: bytes, crop: Crop, clip: Clip | None, background: str | None, flip: bool = False
) -> Tensor:
    """Return the pixels (3, [F,] H, W) of an image or of a clip of a video."""
    if clip is None:
        return images.pixels(content, crop, background, flip)
    assert background is not None  # only images have transparent pixels
    return video.pixels(content, crop, clip, background, flip)


def media_batch_size(config: DataConfig, shape: tuple[int, ...]) -> int:
    """Return the number of media of this shape (3, [F,] H, W) that are encoded together.

    It depends on the shape alone, so latents do not depend on which others are missing."""
    is_video = len(shape) == 4
    if is_video:
        return 1
    height, width = shape[-2:]
    num_images = config.encode_pixels // (height * width)
    return max(1, min(num_images, config.encode_batch_size))


def encode_batch(
    job: EncodeJob, encoders: Any, batch: list[PreparedMedia], writer: StoreWriter
) -> None:
    """Encode media of one shape, and write a row for each.

    The last batch of a shape may be smaller than the others."""
    encoded = encode_pixels(job, encoders, batch)
    for index, media in enumerate(batch):
        tensors = {}
        for name, tensor in encoded.items():
            tensors[name] = tensor[index]
        if media.mask is not None:
            tensors["mask"] = resize_mask(media.mask, tensors["latents"])
        controls = encode_controls(
            job.family,
            encoders,
            control_images(job.config, job.family, media.controls, media.flip),
            job.device,
        )
        tensors |= controls
        writer.add(media.key, tensors)


def resize_mask(mask: Tensor, latents: Tensor) -> Tensor:
    """Return the mean of a mask (H, W) in each cell of the latents (C, [F,] h, w).

    It is the weight of the loss in this cell."""
    height, width = latents.shape[-2:]
    means = F.adaptive_avg_pool2d(mask[None], (height, width))
    return means[0]


def encode_pixels(job: EncodeJob, encoders: Any, batch: list[PreparedMedia]) -> dict[str, Tensor]:
    """Return raw latents, their deviation if it is stored, and the conditioning on the samples.

    The batch is filled up with the first medium."""
    first = batch[0]
    num_padding = media_batch_size(job.config, first.pixels.shape) - len(batch)
    padded = [*batch, *[first] * num_padding]
    pixels = torch.stack([media.pixels for media in padded]).to(job.device)
    latents, deviation = job.family.encode_media(encoders, pixels)
    encoded = {"latents": latents}
    declared_names = set(job.family.sample_conditioning)
    if declared_names:
        masks = [media.mask for media in padded if media.mask is not None]
        stacked_masks = torch.stack(masks).to(job.device) if masks else None
        cond = job.family.encode_sample_conditioning(encoders, pixels, stacked_masks)
        assert set(cond) == declared_names
        assert declared_names.isdisjoint(MEDIA_TENSORS)
        encoded |= cond
    stores_deviation = job.config.vae_sampling == "sample"
    if stores_deviation:
        encoded["deviation"] = deviation
    return encoded
