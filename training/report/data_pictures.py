"""Small pictures of the training data, for the report of a run."""

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from data.plan_samples import PlanSamples
from data.precompute.build import DataPlan, DatasetBuilder
from data.precompute.plan import split_samples
from data.thumbnails import spread_evenly, thumbnails_of_images

MAX_TRAINED, MAX_HELD_OUT = 36, 12
"""Pictures of images that are trained on, and of held-out images."""
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


def data_pictures(builder: DatasetBuilder, plan: DataPlan) -> list[dict[str, Any]]:
    """Return pictures of samples, spread evenly over the data. Samples that are latents have none."""
    split = split_samples(plan.job.planned, builder.config.validation_fraction)
    samples = PlanSamples(plan, split.held_out)
    are_images = samples.have_images()
    are_held_out = samples.is_held_out
    trained = np.flatnonzero(are_images & ~are_held_out)
    held_out = np.flatnonzero(are_images & are_held_out)
    # the first held-out samples are the ones whose captions are the prompts of sample images
    chosen_held_out = held_out[:MAX_HELD_OUT]
    chosen_trained = spread_evenly(trained, MAX_TRAINED)
    indices = np.concatenate([chosen_held_out, chosen_trained])
    indices.sort()
    pictures = []
    for sample, image in thumbnails_of_images(samples, indices):
        captions = sample.listed.captions or [""]
        width, height = sample.bucket_size
        picture = DataPicture(
            name=samples.name(sample),
            caption=captions[0],
            width=width,
            height=height,
            is_held_out=bool(samples.is_held_out[sample.index]),
            image=data_uri(image),
        )
        pictures.append(asdict(picture))
    return pictures


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
