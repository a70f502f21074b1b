"""The `data` section of the config. This module imports no torch, because `--help` reads it."""

from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import Field

from common.config_fields import CHANGEABLE, STRICT

Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class CaptionConfig:
    """Captions: where they come from and how they vary."""

    __pydantic_config__ = STRICT

    text: str | None = None
    """One caption for all images, instead of caption files."""
    extensions: Annotated[tuple[str, ...], Field(min_length=1)] = (".txt", ".caption")
    """Extensions of caption files."""
    column: str = "text"
    """Caption column of a Hugging Face dataset or a metadata file."""
    one_per_line: bool = False
    """Each line of a caption file is a separate caption; one of them is drawn each time the image
    is seen."""
    trigger: str = ""
    """Words put before every caption that does not contain them."""
    separator: Annotated[str, Field(min_length=1)] = ","
    """Separator of the tags in a caption."""
    shuffle: bool = False
    """Shuffle the tags each time the image is seen."""
    keep_tokens: Annotated[int, Field(ge=0)] = 0
    """Number of tags at the front that are neither shuffled nor dropped, in addition to the
    trigger."""
    tag_dropout: Fraction = 0.0
    """Probability of dropping each tag."""
    dropout: Fraction = 0.0
    """Probability of replacing the caption by the empty prompt."""
    max_variants: Annotated[int, Field(ge=1)] = 16
    """Largest number of variants of a caption that are encoded. If shuffling and tag dropout can
    make more, this many are drawn once, and one of them is drawn each time the image is seen."""


if TYPE_CHECKING:
    CaptionOverrides = CaptionConfig
else:
    CaptionOverrides = make_dataclass(
        "CaptionOverrides",
        [
            (item.name, get_type_hints(CaptionConfig, include_extras=True)[item.name] | None, None)
            for item in fields(CaptionConfig)
        ],
        frozen=True,
        namespace={
            "__pydantic_config__": {**STRICT, "use_attribute_docstrings": False},
            "__module__": __name__,
            "__doc__": "Caption options of one source. Options that are not set are taken from "
            "data.captions.",
        },
    )


@dataclass(frozen=True)
class SourceConfig:
    """One of several sources of training data. Options that are None are taken from `data`."""

    __pydantic_config__ = STRICT

    path: str
    """A folder or a Hub id, as in data.path."""
    kind: Literal["auto", "images", "dataset", "comfyui", "encoded"] = "auto"
    """Type of the source. auto: detected from its files."""
    split: str | None = None
    """Split of a Hugging Face dataset. None: train, or the only split."""
    streaming: bool = False
    """Read a Hugging Face dataset row by row, without a copy on this machine."""
    image_column: str | None = None
    """Image column of a Hugging Face dataset."""
    weight_column: str | None = None
    """Column with a factor on the loss of each image."""
    control_paths: tuple[str, ...] | None = None
    """Folders with control images. []: no image of this source has any."""
    control_columns: tuple[str, ...] | None = None
    """Columns with control images."""
    repeats: Annotated[int, Field(ge=1)] = 1
    """Number of times that each image is seen per epoch. kohya's <repeats>_<name> folders multiply
    it."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the loss of the images."""
    regularization: bool = False
    """Regularization images of the class, which keep the model from forgetting it (prior
    preservation). They have no trigger and no caption dropout, are never held out, and their loss is
    multiplied by data.prior_loss_weight."""
    captions: CaptionOverrides = field(default_factory=CaptionOverrides)
    """Caption options of this source."""


@dataclass(frozen=True)
class BlankConfig(SourceConfig):
    """A gray image with the caption of captions.text, for training that needs no images.

    No recipe can name it."""


@dataclass(frozen=True)
class DataConfig:
    """The training images or videos."""

    __pydantic_config__ = STRICT

    path: str | None = None
    """A folder of images with captions, a Hugging Face image dataset (folder or Hub id), a ComfyUI
    dataset or an encoded dataset (docs/data.md). For several of them, use data.sources."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources, each with its own options."""
    image_column: str = "image"
    """Image column of a Hugging Face dataset."""
    weight_column: str | None = None
    """Column of a Hugging Face dataset or a metadata file with a factor on the loss of each image.
    """
    resolution: Annotated[int, Field(ge=16, le=8192)] = 512
    """Side of a square image in pixels. With buckets, other aspect ratios have the same area."""
    bucket_step: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Sides of a bucket are multiples of this. None: the smallest step that the model supports."""
    bucket_min_side: Annotated[int, Field(ge=16)] | None = None
    """Shortest side of a bucket. None: half of data.resolution."""
    bucket_max_side: Annotated[int, Field(ge=16)] | None = None
    """Longest side of a bucket. None: twice data.resolution."""
    upscale: bool = True
    """Enlarge images that are smaller than their bucket. Off: they get a smaller bucket."""
    frames: Annotated[int, Field(ge=1)] = 1
    """Frames of a video clip, for video models. A shorter video gives as many frames as the model
    supports. Image-to-video models need more than one."""
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Frames per second of a clip; the frames of other videos are repeated or left out. None: the
    rate of the model."""
    video_clips: Literal["first", "spread"] = "first"
    """Clips of a video that are trained on. first: its beginning. spread: as many as fit, evenly
    spaced."""
    random_flip: bool = False
    """Mirror an image horizontally with probability 1/2 each time it is seen. The mirrored image is
    encoded too."""
    vae_sampling: Literal["mode", "sample"] = "mode"
    """mode: use the most likely latents. sample: store mean and standard deviation, and draw
    latents each time."""
    background: str = "white"
    """Color behind transparent images: a name or #rrggbb."""
    masks: Literal["none", "alpha", "files"] = "none"
    """Masks of the loss. alpha: the loss counts where the image is opaque. files: it counts where
    <name>_mask.<extension> next to the image is white."""
    control_paths: tuple[str, ...] | None = None
    """Folders with the control images of an edit model, which have the names of the images. Several
    folders: each gives one control image, in this order. In one folder, an image may have several:
    <name>_0, <name>_1. None: they are next to the image, <name>_control and <name>_control_1, or in
    data.control_columns. []: no image has any."""
    control_columns: tuple[str, ...] | None = None
    """Columns with control images, of a Hugging Face dataset, or with their paths, of a metadata
    file. None: the column control_image, if there is one."""
    control_pixels: Annotated[int, Field(ge=16 * 16)] | None = None
    """Largest area in pixels of a control image in training, which takes less memory. None: the size
    that the pipeline of the model gives it. Samples always have that size."""
    control_dropout: Fraction = 0.0
    """Probability of training a batch without its control images, for models that can do without."""
    mask_min_value: Fraction = 0.0
    """Weight of the loss where the mask is black."""
    prior_loss_weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the loss of regularization images."""
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    on_error: Literal["fail", "skip"] = "fail"
    """Action on unusable files. fail: list all errors and end the run. skip: list them and train
    without these files."""
    encode_batch_size: Annotated[int, Field(ge=1), CHANGEABLE] = 8
    """Captions that are encoded together, and the largest number of images."""
    encode_pixels: Annotated[int, Field(ge=1), CHANGEABLE] = 1024 * 1024
    """Pixels of the images that are encoded together: 4 images of 512x512, or 1 of 1024x1024. A
    larger image, or a video, is encoded alone."""
    cache_dir: Annotated[str, CHANGEABLE] = "output/cache"
    """Folder that keeps latents and conditioning between runs. It may be deleted. Several nodes
    must share it."""
    validation_path: Annotated[str | None, CHANGEABLE] = None
    """Images held out for validation, in any form that data.path supports."""
    validation_control_paths: Annotated[tuple[str, ...] | None, CHANGEABLE] = None
    """Folders with the control images of data.validation_path."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the images to hold out for validation, without data.validation_path."""
    num_workers: Annotated[int, Field(ge=0, le=64), CHANGEABLE] = 1
    """Threads per process that prepare batches ahead of time. 0: prepare each batch when it is
    needed."""

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """Return data.path, as the first source, and data.sources, with the options that they take
        from `data`."""
        sources = list(self.sources)
        if self.path is not None:
            sources.insert(0, SourceConfig(self.path))
        return tuple(self.with_defaults(source) for source in sources)

    def validation_source(self) -> SourceConfig:
        """Return data.validation_path as a source. Its control images are in other folders."""
        assert self.validation_path is not None
        source = self.with_defaults(SourceConfig(self.validation_path))
        return replace(source, control_paths=self.validation_control_paths)

    def with_defaults(self, source: SourceConfig) -> SourceConfig:
        """Fill the options of `source` that are not set."""
        unset = {
            name: getattr(self, name)
            for name in ("image_column", "weight_column", "control_paths", "control_columns")
            if getattr(source, name) is None
        }
        captions = CaptionConfig(
            **{item.name: self._caption_option(source, item.name) for item in fields(CaptionConfig)}
        )
        return replace(source, captions=captions, **unset)

    def _caption_option(self, source: SourceConfig, name: str) -> Any:
        value = getattr(source.captions, name)
        return getattr(self.captions, name) if value is None else value
