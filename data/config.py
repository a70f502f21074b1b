"""The `data` section of the config. No torch here: `--help` reads it."""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from pydantic import Field

from common.strict import STRICT

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class CaptionOptions:
    """Where captions come from and what is done to them; the same for all sources that do not say otherwise."""

    __pydantic_config__ = STRICT

    caption: str | None = None
    """One caption for all images, in place of caption files."""
    caption_extension: Annotated[tuple[str, ...], Field(min_length=1)] = (".txt", ".caption")
    """Extensions of caption files."""
    caption_column: str = "text"
    """Column of the captions in a Hugging Face dataset or a metadata file."""
    caption_multi: bool = False
    """Each line of a caption file is a caption of its own, of which a visit draws one."""
    caption_trigger: str = ""
    """Words put before every caption, unless it has them already."""
    caption_separator: Annotated[str, Field(min_length=1)] = ","
    """What separates the tags of a caption."""
    caption_shuffle: bool = False
    """Tags in another order at each visit."""
    caption_keep_tokens: Annotated[int, Field(ge=0)] = 0
    """How many tags at the front are neither shuffled nor dropped, besides the trigger."""
    caption_tag_dropout: Share = 0.0
    """Probability with which each tag is left out of a visit."""
    caption_dropout: Share = 0.0
    """Probability with which a visit is given the empty prompt."""


@dataclass(frozen=True)
class SourceConfig:
    """One of several sources of training data. What is None is as `data` says."""

    __pydantic_config__ = STRICT

    path: str
    """A folder or a hub id, as data.images."""
    kind: Literal["auto", "images", "dataset", "comfyui", "encoded"] = "auto"
    """What it is. auto: seen from the folder's files."""
    split: str | None = None
    """Split of a Hugging Face dataset; None: train, or the only one."""
    streaming: bool = False
    """Read a Hugging Face dataset row by row, without a copy of it on this machine."""
    image_column: str | None = None
    """Column of the images in a Hugging Face dataset."""
    weight_column: str | None = None
    """As data.weight_column."""
    repeats: Annotated[int, Field(ge=1)] = 1
    """How often each image is seen per epoch, besides kohya's <repeats>_<name> folders."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the loss of its images."""
    regularisation: bool = False
    """Images of the class, which keep the model from forgetting it (prior preservation): without trigger and caption
    dropout, never held out, their loss times data.prior_weight."""
    caption: str | None = None
    """As data.caption."""
    caption_extension: tuple[str, ...] | None = None
    """As data.caption_extension."""
    caption_column: str | None = None
    """As data.caption_column."""
    caption_multi: bool | None = None
    """As data.caption_multi."""
    caption_trigger: str | None = None
    """As data.caption_trigger."""
    caption_separator: str | None = None
    """As data.caption_separator."""
    caption_shuffle: bool | None = None
    """As data.caption_shuffle."""
    caption_keep_tokens: Annotated[int, Field(ge=0)] | None = None
    """As data.caption_keep_tokens."""
    caption_tag_dropout: Share | None = None
    """As data.caption_tag_dropout."""
    caption_dropout: Share | None = None
    """As data.caption_dropout."""


@dataclass(frozen=True)
class DataConfig(CaptionOptions):
    """The training images."""

    images: str | None = None
    """A folder of images with captions, a Hugging Face image dataset (a folder or a hub id), a dataset of ComfyUI's, or
    one that is encoded already: docs/data.md. For several of them: data.sources."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources, each with options of its own."""
    image_column: str = "image"
    """Column of the images in a Hugging Face dataset."""
    weight_column: str | None = None
    """Column of a Hugging Face dataset or a metadata file that holds a factor on the loss of each image."""
    resolution: Annotated[int, Field(ge=16, le=8192)] = 512
    """Side of a square image in pixels; with buckets, images of other shapes have the same area."""
    bucket_step: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Sides of a bucket are multiples of this; None: the least that the model takes."""
    bucket_min_side: Annotated[int, Field(ge=16)] | None = None
    """Shortest side of a bucket; None: half of data.resolution."""
    bucket_max_side: Annotated[int, Field(ge=16)] | None = None
    """Longest side of a bucket; None: twice data.resolution."""
    upscale: bool = True
    """Enlarge images that are smaller than their bucket. Off: they get a smaller bucket."""
    frames: Annotated[int, Field(ge=1)] = 1
    """Frames of a clip of a video, for models of videos; a video that has fewer gives as many as the model can take.
    Image to video wants more than one."""
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Frames of a clip per second, whatever a video's own rate; None: the model's."""
    clip: Literal["first", "spread"] = "first"
    """Which clips of a video are trained on. first: its beginning. spread: as many as fit into it, spread evenly."""
    flip: bool = False
    """Mirror every other visit of an image from left to right, at random; encoded beside the image."""
    vae_sampling: Literal["mode", "sample"] = "mode"
    """mode: each latent is the most likely one. sample: its mean and deviation are stored, and each visit draws."""
    background: str = "white"
    """Colour behind transparent images: a name or #rrggbb."""
    masks: Literal["none", "alpha", "files"] = "none"
    """Where the loss counts. alpha: where an image is opaque. files: <name>_mask.<extension> beside an image, white."""
    mask_floor: Share = 0.0
    """What the loss counts where the mask is black."""
    prior_weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the loss of regularisation images."""
    max_variants: Annotated[int, Field(ge=1)] = 16
    """If shuffling and dropping tags can make more captions of an image than this, so many are drawn once and encoded,
    of which a visit draws one; else all of them."""
    on_error: Literal["fail", "skip"] = "fail"
    """What happens to a source with bad files. fail: the run lists all faults and ends. skip: it leaves them out and
    says so."""
    encode_batch_size: Annotated[int, Field(ge=1)] = 8
    """Images or captions that are encoded together."""
    cache_dir: str = "output/cache"
    """Where latents and conditioning are kept between runs; safe to delete. Several nodes must share it."""
    validation_images: str | None = None
    """Images held out for validation, in the same form as data.images."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the images to hold out for validation when there is no data.validation_images."""
    num_workers: Annotated[int, Field(ge=0, le=64)] = 1
    """Threads per rank that make batches ahead of time; 0 makes each when it is needed."""

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """data.images as the first of data.sources; nothing in them is None that `data` says."""
        first = () if self.images is None else (SourceConfig(self.images),)
        return tuple(self.with_defaults(source) for source in (*first, *self.sources))

    def with_defaults(self, source: SourceConfig) -> SourceConfig:
        ours = {item.name for item in fields(self)}
        unsaid = [item.name for item in fields(source) if getattr(source, item.name) is None and item.name in ours]
        return replace(source, **{name: getattr(self, name) for name in unsaid})
