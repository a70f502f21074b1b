"""Encoded samples in training order. Their tensors are read from disk when they are needed.

<folder>/index.json                   content hash, buckets, shards of the stores
<folder>/samples.npy                  a record for each sample (`record_dtype`)
<folder>/captions.npy                 row ids of the captions of all samples, one after another
<folder>/class_captions.npy           row ids of the same captions with the class, if the run uses these
<folder>/caption_probabilities.npy    the probabilities of drawing them
<folder>/listed.arrow                 names and captions, which training does not read
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data.config import DataConfig
from data.media.buckets import Crop
from data.samples import ListedSample
from data.schedule import Segment
from data.store.schema import MEDIA_TENSORS, VariableLengths
from data.store.store import Store
from data.store.tables import Table
from models.controls import is_control_latents

INDEX_FILE = "index.json"
SAMPLES_FILE = "samples.npy"
CAPTIONS_FILE = "captions.npy"
CLASS_CAPTIONS_FILE = "class_captions.npy"
PROBABILITIES_FILE = "caption_probabilities.npy"
LISTED_FILE = "listed.arrow"


def record_dtype(num_orientations: int) -> np.dtype:
    """Return the fields of a sample's record.

    listed              index in the table of listed samples
    media               row ids of the latents, and of the mirrored latents if images are mirrored
    first_caption       position of the first caption in the captions of all samples
    num_captions        number of captions
    crop                the fields of buckets.Crop
    weight              factor on the loss
    caption_dropout     probability of using the empty prompt
    """
    return np.dtype(
        [
            ("listed", np.int64),
            ("media", np.int64, (num_orientations,)),
            ("first_caption", np.int64),
            ("num_captions", np.int64),
            ("crop", np.int32, (len(fields(Crop)),)),
            ("weight", np.float32),
            ("caption_dropout", np.float32),
        ]
    )


@dataclass(frozen=True)
class Stores:
    """The stores of the latents and of the conditioning of a run."""

    media: Store
    text: Store
    variable_lengths: VariableLengths = field(default_factory=dict)
    """Conditioning with as many tokens as the caption has, as the family declares it."""


@dataclass(frozen=True)
class DatasetIndex:
    """The content of the index file."""

    content_hash: str
    """Hash of all that training depends on; neither names nor the order of files matter."""
    segments: list[list[list[int]]]
    """For each bucket its segments: first sample, number of samples, repeats."""
    empty_caption: int
    """Row id of the empty prompt; MISSING if it is not needed."""
    num_never_dropped: int
    """Samples whose captions are never dropped, though that is configured."""
    media_shards: list[str]
    text_shards: list[str]
    extra_prompts: dict[str, int] = field(default_factory=dict)
    """Row ids of the prompts that are encoded besides the captions."""
    class_hash: str = ""
    """Hash of the captions with the class instead of the trigger; empty if the run has none."""

    def save(self, folder: Path) -> None:
        text = json.dumps(asdict(self))
        (folder / INDEX_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "DatasetIndex":
        text = (folder / INDEX_FILE).read_text(encoding="utf-8")
        return cls(**json.loads(text))

    @property
    def buckets(self) -> tuple[tuple[Segment, ...], ...]:
        """Return the segments of each bucket."""
        buckets = []
        for segments in self.segments:
            bucket = []
            for first, count, repeats in segments:
                bucket.append(Segment(first, count, repeats))
            buckets.append(tuple(bucket))
        return tuple(buckets)


class LatentDataset:
    """Encoded images or videos with their captions, in training order."""

    def __init__(self, folder: Path, stores: Stores, config: DataConfig | None = None):
        """`folder`: written by write_index."""
        config = config or DataConfig()
        self.folder = folder
        self.min_mask_weight = config.mask_min_value
        self.control_dropout = config.control_dropout
        self.media = stores.media
        self.text = stores.text
        self.variable_lengths = stores.variable_lengths
        index = DatasetIndex.load(folder)
        self.content_hash = index.content_hash
        self.empty_caption = index.empty_caption
        self.extra_prompts = index.extra_prompts
        self.buckets = index.buckets
        self.samples = np.load(folder / SAMPLES_FILE, mmap_mode="r")
        self.caption_ids = np.load(folder / CAPTIONS_FILE, mmap_mode="r")
        self.class_caption_ids = self.caption_ids
        if index.class_hash:
            self.class_caption_ids = np.load(folder / CLASS_CAPTIONS_FILE, mmap_mode="r")
        self.caption_probabilities = np.load(folder / PROBABILITIES_FILE, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def epoch_size(self) -> int:
        """Number of samples seen per epoch."""
        return sum(segment.visits for bucket in self.buckets for segment in bucket)

    @cached_property
    def listed(self) -> Table[ListedSample]:
        """Open the table with names and captions."""
        return Table(self.folder / LISTED_FILE, ListedSample)

    def name(self, row: int) -> str:
        """Return the name of a sample."""
        index = int(self.samples["listed"][row])
        return self.listed[index].name

    def first_captions(self) -> Iterator[str]:
        """Yield the first caption of each sample; an empty one for stored conditioning."""
        for _, sample in self.listed.rows(np.asarray(self.samples["listed"])):
            yield sample.captions[0] if sample.captions else ""

    def captions(self, count: int) -> list[str]:
        """Return the first captions that differ, at most `count`."""
        different: dict[str, None] = {}
        for caption in self.first_captions():
            different[caption] = None
            if len(different) == count:
                break
        return list(different)

    def crop(self, row: int) -> Crop:
        """Return the size of a sample before encoding, and its crop."""
        return Crop(*self.samples["crop"][row].tolist())

    def size(self, row: int) -> tuple[int, int]:
        """Return height and width of a sample in pixels."""
        crop = self.crop(row)
        return crop.crop_height, crop.crop_width

    def media_id(self, row: int) -> int:
        """Return the row id of a sample's latents."""
        return int(self.samples["media"][row, 0])

    def latent_shape(self, row: int) -> tuple[int, ...]:
        """Return (C, [F,] h, w) of a sample's latents, which are not read."""
        return self.media.locate(self.media_id(row)).spec("latents").shape

    def num_controls(self, row: int) -> int:
        """Return the number of control images of a sample."""
        return len(self.control_sizes(row))

    def control_sizes(self, row: int) -> list[tuple[int, int]]:
        """Return height and width of the latents of each control image of a sample.

        Those of ComfyUI's datasets are stored with the text."""
        stored_rows = (
            self.media.locate(self.media_id(row)),
            self.text.locate(self.caption_id(row)),
        )
        sizes = []
        for stored_row in stored_rows:
            for name in stored_row.shard.columns:
                if is_control_latents(name):
                    *_, height, width = stored_row.spec(name).shape
                    sizes.append((height, width))
        return sizes

    def latent_frames(self, row: int) -> int:
        """Return the number of frames of a sample's latents; 1 for an image."""
        _, *frames, _, _ = self.latent_shape(row)
        return frames[0] if frames else 1

    def caption_id(self, row: int, draw: float | None = None) -> int:
        """Return the row id of a caption of a sample: see `caption_position`."""
        return self.caption_ids.item(self.caption_position(row, draw))

    def class_caption_id(self, row: int, draw: float | None = None) -> int:
        """Return the row id of the same caption with the class instead of the trigger."""
        return self.class_caption_ids.item(self.caption_position(row, draw))

    def caption_position(self, row: int, draw: float | None = None) -> int:
        """Return the position of a caption of a sample among the captions of all samples.

        It is the caption at `draw` in [0, 1), if captions are laid out by their probabilities, or
        the first caption."""
        sample = self.samples[row]
        first = int(sample["first_caption"])
        end = first + int(sample["num_captions"])
        if draw is None or end == first + 1:
            return first
        cumulative = np.cumsum(self.caption_probabilities[first:end])
        threshold = draw * cumulative[-1]
        position = first + int(np.searchsorted(cumulative, threshold, "right"))
        return min(position, end - 1)

    def latents(self, row: int) -> Tensor:
        """Return the raw latents (C, [F,] h, w) of a sample."""
        return self.media.read_tensor(self.media_id(row), "latents")

    def cond(self, row: int) -> dict[str, Tensor]:
        """Return the conditioning of a sample with its first caption.

        The tensors have no batch dimension and no padding."""
        caption_id = self.caption_id(row)
        media_id = self.media_id(row)
        cond = self.text.read_row(caption_id)
        for name in self.media.tensor_names(media_id):
            if name in MEDIA_TENSORS:
                continue
            cond[name] = self.media.read_tensor(media_id, name)
        return cond


def sample_cond(media: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors of media rows that are conditioning."""
    return {name: tensor for name, tensor in media.items() if name not in MEDIA_TENSORS}
