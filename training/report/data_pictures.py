"""Small pictures of the training data, for the report of a run."""

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.plan_samples import PlanSamples, Sample
from data.precompute.build import DataPlan, DatasetBuilder
from data.precompute.plan import split_samples
from data.thumbnails import spread_evenly, thumbnails_of_images
from training.sampling.measures import DataImages, as_text, small_image

MAX_TRAINED, MAX_HELD_OUT = 36, 12
"""Pictures of images that are trained on, and of held-out images."""
MAX_COMPARED = 512
"""Training images with which samples are compared."""
PROGRESS_AFTER = 2.0
"""Seconds after which the progress of reading is shown."""
WEBP_QUALITY = 80
DATA_PREFIX = "data:image/webp;base64,"


@dataclass(frozen=True)
class DataPicture:
    """A picture of a sample, as training sees it."""

    name: str
    caption: str
    width: int
    height: int
    """Size in which the sample is trained, in pixels."""
    is_held_out: bool
    image: str
    """The picture as a data URI."""


@dataclass(frozen=True)
class DataPictures:
    """Pictures of samples of the data, and small versions of more of the training images."""

    pictures: list[dict[str, Any]]
    """Pictures as values that JSON has."""
    small_images: str
    """Small images for DataImages.from_text."""

    @property
    def images(self) -> DataImages | None:
        """Return the training images for distances; None without enough images."""
        return DataImages.from_text(self.small_images)


NO_PICTURES = DataPictures([], "")


def data_pictures(builder: DatasetBuilder, plan: DataPlan, max_compared: int) -> DataPictures:
    """Return pictures of samples, spread evenly over the data. Samples that are latents have none.

    `max_compared`: largest number of training images for distances."""
    split = split_samples(plan.job.planned, builder.config.validation_fraction)
    samples = PlanSamples(plan, split.held_out)
    are_images = samples.have_images()
    are_held_out = samples.is_held_out
    trained = np.flatnonzero(are_images & ~are_held_out)
    held_out = np.flatnonzero(are_images & are_held_out)
    # the first held-out samples are the ones whose captions are the prompts of sample images
    shown = {*held_out[:MAX_HELD_OUT], *spread_evenly(trained, MAX_TRAINED)}
    compared = {*spread_evenly(trained, max_compared)}
    pictures = []
    small_images = []
    indices = np.array(sorted(shown | compared), np.int64)
    thumbnails = thumbnails_of_images(samples, indices)
    for sample, image in tqdm(thumbnails, "pictures", len(indices), delay=PROGRESS_AFTER):
        if sample.index in shown:
            pictures.append(asdict(data_picture(samples, sample, image)))
        if sample.index in compared:
            levels = np.asarray(image, float)
            small_images.append(small_image(levels / 255))
    return DataPictures(pictures, as_text(small_images))


def data_picture(samples: PlanSamples, sample: Sample, image: Image.Image) -> DataPicture:
    """Return the picture of a sample. `image`: its thumbnail."""
    captions = sample.listed.captions or [""]
    width, height = sample.bucket_size
    return DataPicture(
        name=samples.name(sample),
        caption=captions[0],
        width=width,
        height=height,
        is_held_out=bool(samples.is_held_out[sample.index]),
        image=data_uri(image),
    )


def data_uri(image: Image.Image) -> str:
    """Return an image as a WebP in a data URI."""
    buffer = io.BytesIO()
    colors = image.convert("RGB")
    colors.save(buffer, "WEBP", quality=WEBP_QUALITY)
    code = base64.b64encode(buffer.getvalue())
    return DATA_PREFIX + code.decode()


def picture_of_caption(pictures: Sequence[dict[str, Any]], caption: str) -> str | None:
    """Return the picture of the sample with a caption, first of a held-out one; None if there is
    none."""
    image: str | None = None
    for picture in pictures:
        if picture["caption"] != caption:
            continue
        if picture["is_held_out"]:
            return picture["image"]
        image = image or picture["image"]
    return image
