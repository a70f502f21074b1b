"""Samples of the training data, from the rows of a source to what is trained on.

A ListedSample is a row of a source whose content was not looked at. A PlannedSample says how a
listed sample is trained on. Both are stored in tables (data/store/tables.py), with a column for
each field.
"""

from dataclasses import dataclass, field

import numpy as np

from data.media.buckets import Crop
from data.media.video import Clip
from data.store.tables import Int64, Table


@dataclass(frozen=True)
class ListedSample:
    """A row of a source, before its content is looked at."""

    row: Int64
    """Number of the row in its source."""
    name: str
    """Name for messages: a path in the folder of the source, or the number of the row."""
    captions: list[str]
    stamp: str
    """Text that changes when the content may have changed, without reading the content."""
    repeats: int = 1
    """Number of times that the sample is seen per epoch."""
    weight: float = 1.0
    """Factor on the loss."""
    mask_path: str = ""
    """Path of a mask file; empty if there is no mask."""
    control_paths: list[str] = field(default_factory=list)
    """Paths of the control images, unless they are in the content of the row."""
    width: int = 0
    height: int = 0
    """Size in pixels of stored latents; 0 for images."""
    source: int = 0
    """Number of the source among the sources of the run."""


@dataclass(frozen=True)
class PlannedSample:
    """A sample that is trained on or held out: an image, a clip of a video, or stored latents."""

    listed: Int64
    """Index of the sample in the table of listed samples."""
    content_hash: bytes
    """Hash of the content; equal for copies of a file, and for all clips of a video."""
    media_keys: list[bytes]
    """Key of the latents, followed by that of the mirrored latents if images are mirrored."""
    caption_keys: list[bytes]
    caption_probabilities: list[float]
    """Probabilities of drawing the captions."""
    crop: Crop
    class_caption_keys: list[bytes] = field(default_factory=list)
    """For each caption, the key of the caption with the class instead of the trigger, if the run
    uses these."""
    clip: Clip | None = None
    """Frames of a video; None for images and stored latents."""
    repeats: int = 1
    weight: float = 1.0
    caption_dropout: float = 0.0
    """Probability of using the empty prompt."""
    is_held_out: bool = False
    """Belongs to the validation images of a source."""
    can_be_held_out: bool = True
    """May be chosen for validation by data.validation_fraction."""


def media_keys(planned: Table[PlannedSample]) -> np.ndarray:
    """Return the keys of the latents: a line for each sample, a column for each orientation.

    All samples have equally many orientations."""
    keys = planned.keys("media_keys")
    num_samples = len(planned)
    num_orientations = len(keys) // max(1, num_samples)
    lengths = planned.lengths("media_keys")
    assert (lengths == num_orientations).all()
    return keys.reshape(num_samples, num_orientations)
