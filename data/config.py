"""The `data` section of the config. No torch here: `--help` reads it."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field


class DataError(ValueError):
    """Images or captions that cannot be used; the message lists every one of them."""


@dataclass(frozen=True)
class DataConfig:
    """The training images."""

    __pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    images: str | None = None
    """A folder of png, jpg and webp images with caption files beside them (sub-folders named <repeats>_<name> are seen
    <repeats> times per epoch), or a Hugging Face image dataset written with save_to_disk."""
    caption_extension: str = ".txt"
    """Extension of the caption files."""
    caption: str | None = None
    """One caption for all images, in place of caption files."""
    image_column: str = "image"
    """Column of the images in a Hugging Face dataset."""
    caption_column: str = "text"
    """Column of the captions in a Hugging Face dataset."""
    resolution: Annotated[int, Field(ge=16, le=8192)] = 512
    """Images are resized (shorter side) and centre-cropped to this many pixels square."""
    cache_dir: str = "output/cache"
    """Where latents and conditioning are kept between runs; safe to delete."""
    validation_images: str | None = None
    """Images held out for validation, in the same form as data.images."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of data.images to hold out for validation when there is no data.validation_images."""
    num_workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Loader processes per rank; 0 loads in the training process."""
