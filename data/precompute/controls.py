"""Control images of edit models: their part in the keys of rows, and their encoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from common.errors import DataError
from data.config import DataConfig, SourceConfig
from data.media import images
from data.media.buckets import Crop
from data.store.keys import key_of
from models import family_classes
from models.base import ModelFamily
from models.controls import (
    ControlImage,
    ControlLimits,
    ControlSize,
    control_name,
    features_name,
)


class ContentHashes(NamedTuple):
    """Hashes of the content of a sample, of its mask and of its control images."""

    content: bytes
    mask: bytes
    controls: bytes = key_of()

    @property
    def has_controls(self) -> bool:
        return self.controls != key_of()


@dataclass(frozen=True)
class ControlKeys:
    """The part of control images in the keys of rows."""

    limits: ControlLimits
    description: str
    """All that decides the size of encoded control images besides their own size."""
    background: str
    """data.background, which text encoders see behind transparent images."""

    @classmethod
    def of(cls, config: DataConfig, family: ModelFamily) -> "ControlKeys":
        return cls(
            limits=family.controls,
            description=f"{family.name} {config.control_pixels}",
            background=config.background,
        )

    def media_contents(self, hashes: ContentHashes) -> list[str | bytes]:
        """Return the part of the key of latents."""
        if not hashes.has_controls:
            return []
        return ["controls", hashes.controls, self.description]

    def seen_with_caption(self, hashes: ContentHashes) -> bool:
        """Return whether the text encoder sees control images of this sample with its captions."""
        return self.limits.is_seen_by_text_encoder and hashes.has_controls

    def caption_key(self, text: str, hashes: ContentHashes) -> bytes:
        """Return the key of the conditioning of a caption."""
        if not self.seen_with_caption(hashes):
            return key_of(text)
        return key_of("caption with images", text, hashes.controls, self.background)


def check_options(config: DataConfig, family: ModelFamily) -> None:
    """Raise DataError for options about control images that the model has no use for, and for missing
    masks."""
    check_masks(config, family)
    limits = family.controls
    options: dict[str, object] = {
        "control_pixels": config.control_pixels,
        "control_dropout": config.control_dropout,
    }
    sources: list[DataConfig | SourceConfig] = [config, *config.sources]
    for source in sources:
        options["control_paths"] = " ".join(source.control_paths or ())
        options["control_columns"] = " ".join(source.control_columns or ())
        used = [name for name, value in options.items() if value]
        if used and not limits.max_count:
            raise DataError(
                f"--data.{used[0]} {options[used[0]]}: models of the family {family.name} take no "
                f"control images. {advice_for(family)}"
            )
    if config.random_flip and limits.is_seen_by_text_encoder:
        raise DataError(
            f"--data.random_flip: the text encoder of {family.name} sees the control images with the "
            "caption, and would see them unmirrored. Remove the option"
        )
    if config.control_dropout and limits.is_required:
        raise DataError(
            f"--data.control_dropout {config.control_dropout}: models of the family {family.name} "
            "always need a control image. Remove the option"
        )


def check_masks(config: DataConfig, family: ModelFamily) -> None:
    """Raise DataError for a model that paints masks, if the data has none."""
    if family.paints_masks and config.masks == "none":
        raise DataError(
            f"--data.masks none: {family.name} paints the part of an image that a mask shows; expected "
            "files or alpha. Put <name>_mask.png next to each image, white where the model paints, and "
            f"use recipes/{family.name}.yaml or --data.masks files"
        )


def advice_for(family: ModelFamily) -> str:
    """Return what to do if a model takes no control images."""
    similar_families = []
    for name, family_class in family_classes().items():
        if family_class.same_files_as == family.name:
            similar_families.append(name)
    advice = "Remove the option, or use a model that edits"
    if similar_families:
        names = " or ".join(similar_families)
        advice += f". A single file does not say that it edits: set --model.family {names}"
    return advice


def control_images(
    config: DataConfig, family: ModelFamily, contents: Sequence[bytes], flip: bool
) -> list[ControlImage]:
    """Return control images in the sizes that the model takes."""
    controls = []
    for picture in control_pictures(contents, config.background):
        size = family.control_size(picture.width, picture.height, config.control_pixels)
        crop = centered_crop(picture.width, picture.height, size)
        pixels = images.scale(picture, crop, flip)
        controls.append(ControlImage(picture, flip, size, pixels))
    return controls


def centered_crop(width: int, height: int, size: ControlSize) -> Crop:
    """Return the crop of an image that a control size describes."""
    return Crop(
        width=width,
        height=height,
        scaled_width=size.scaled_width,
        scaled_height=size.scaled_height,
        left=(size.scaled_width - size.width) // 2,
        top=(size.scaled_height - size.height) // 2,
        crop_width=size.width,
        crop_height=size.height,
    )


@torch.no_grad()
def encode_controls(
    family: ModelFamily, encoders: Any, controls: Sequence[ControlImage], device: torch.device
) -> dict[str, Tensor]:
    """Return the raw latents of control images, and their features if a vision model sees them, by name.

    Each is encoded alone, so its latents do not depend on other samples."""
    encoded = {}
    for number, image in enumerate(controls):
        latents = family.encode_control(encoders, image.pixels[None].to(device))
        encoded[control_name(number)] = latents[0]
        features = family.control_features(encoders, image)
        if features is not None:
            encoded[features_name(number)] = features
    return encoded


def control_pictures(contents: Sequence[bytes], background: str) -> list[Image.Image]:
    """Return control images in their own sizes, as text encoders and pipelines get them."""
    return [images.picture(content, background) for content in contents]
