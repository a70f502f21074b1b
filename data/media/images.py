"""Turns the content of an image file into pixels and masks; the one place where image files are
opened."""

import io
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageChops,
    ImageCms,
    ImageColor,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from torch import Tensor

from common.errors import DataError
from data.media.buckets import Crop

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
MAX_PIXELS = 2**28
PILLOWS_LIMIT = threading.Lock()
Result = TypeVar("Result")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Numbers that may mean white where the file does not say: the first that no pixel exceeds. Floats
# are 0..1 as a rule, and highlights above that are common, so that only much larger ones tell
# another scale: (largest pixel, white).
WHITES_OF_INTEGERS = ((255, 255), (65535, 65535), (2**31 - 1, 2**31 - 1), (2**32 - 1, 2**32 - 1))
WHITES_OF_FLOATS = ((16, 1), (255, 255), (65535, 65535))


def under_our_limit(do: Callable[[], Result]) -> Result:
    """Some readers ask Pillow's limit of pixels, which others may have changed: if it refuses, it
    is ours for a moment.

    `do` is quick, and may be called twice. Raises Image.DecompressionBombError above our limit.
    """
    try:
        return do()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        with PILLOWS_LIMIT:
            before, Image.MAX_IMAGE_PIXELS = (
                Image.MAX_IMAGE_PIXELS,
                MAX_PIXELS // 2,
            )  # Pillow refuses twice its limit
            try:
                return do()
            finally:
                Image.MAX_IMAGE_PIXELS = before


class Tiff(TiffImagePlugin.TiffImageFile):
    """Pillow's reader, which asks its limit once more before it makes room for the pixels."""

    def load_prepare(self) -> None:
        under_our_limit(super().load_prepare)


# What a file begins with tells its format, whatever its name. Pillow's classes are used in place of
# Image.open, because that asks Pillow's process-wide limit, which others may have changed. A JPEG
# of several pictures (MPO) is read as its first one, which also spares us the faults of its index.
READERS: tuple[tuple[re.Pattern[bytes], Callable[[io.BytesIO], ImageFile.ImageFile]], ...] = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), Tiff),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
)


@dataclass(frozen=True)
class ImageFacts:
    """Size in pixels of an image as it is shown, after its EXIF turn, and whether it has
    transparency of any form."""

    width: int
    height: int
    has_alpha: bool


@dataclass(frozen=True, eq=False)
class Layers:
    """A decoded image as it is shown: `color` in mode L, RGB or CMYK and the colors of `profile`,
    `alpha` in L."""

    color: Image.Image
    alpha: Image.Image | None
    profile: bytes | None


def check(data: bytes) -> ImageFacts:
    """Decodes a file's content once, its first frame; raises DataError saying why it cannot be
    used."""
    layers = decode(data)
    return ImageFacts(layers.color.width, layers.color.height, layers.alpha is not None)


def pixels(data: bytes, crop: Crop, background: str, flip: bool = False) -> Tensor:
    """An image's sRGB colors over `background`, (3, crop_height, crop_width) float32 in [-1, 1].

    `flip` mirrors the window from left to right. Raises DataError as check() does, and for what is
    no color.
    """
    if fault := color_fault(background):
        raise DataError(fault)
    layers = decode(data)
    return scaled(over(to_srgb(layers.color, layers.profile), background, layers.alpha), crop, flip)


def over(image: Image.Image, background: str, alpha: Image.Image | None = None) -> Image.Image:
    """The image in RGB over `background` where `alpha`, or its own, is not opaque."""
    if alpha is None and image.mode != "RGBA":
        return image
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image.getchannel("A") if alpha is None else alpha)
    return canvas


def scaled(image: Image.Image, crop: Crop, flip: bool) -> Tensor:
    """The crop's window of an RGB image, (3, crop_height, crop_width) float32 in [-1, 1]."""
    return torch.from_numpy(window(image, crop, flip) / 127.5 - 1).permute(2, 0, 1).contiguous()


def alpha_mask(data: bytes, crop: Crop, flip: bool = False) -> Tensor:
    """How opaque an image is, (crop_height, crop_width) float32 in [0, 1]; all ones for one without
    transparency.

    Raises DataError as check() does.
    """
    alpha = decode(data).alpha
    if alpha is None:
        return torch.ones(crop.crop_height, crop.crop_width)
    return torch.from_numpy(window(alpha, crop, flip) / 255)


def mask_file(data: bytes, crop: Crop, flip: bool = False) -> Tensor:
    """A mask image's brightness, (crop_height, crop_width) float32 in [0, 1]; transparent counts as
    black.

    `crop` is that of the image which the mask is for. The mask may have another size: all of it is scaled to the crop's
    scaled size. Its numbers count as they are, without its color profile. Raises DataError as check() does.
    """
    layers = decode(data)
    image = layers.color.convert("RGB").convert("L")
    if layers.alpha is not None:
        image = ImageChops.multiply(image, layers.alpha)
    return torch.from_numpy(window(image, crop, flip) / 255)


def color_fault(background: str) -> str | None:
    """Why `background` is neither a color name of Pillow's (those of CSS) nor #rrggbb; None if it
    is."""
    if background.lower() in ImageColor.colormap or re.fullmatch(r"#[0-9a-fA-F]{6}", background):
        return None
    return f"{background!r} is not a color; give a name such as white, black or gray, or #rrggbb"


def reader_of(data: bytes) -> Callable[[io.BytesIO], ImageFile.ImageFile] | None:
    return next((reader for magic, reader in READERS if magic.match(data)), None)


def decode(data: bytes) -> Layers:
    """The first frame of a file's content, turned as its EXIF says; raises DataError saying why
    there is none."""
    if not data:
        raise DataError("the file is empty")
    reader = reader_of(data)
    if reader is None:
        raise DataError("not an image (PNG, JPEG, WebP, GIF, TIFF or BMP)")
    try:
        with under_our_limit(lambda: reader(io.BytesIO(data))) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"{width}x{height} pixels; more than {MAX_PIXELS} are taken for an attack"
                )
            image.load()
            color, alpha = split(image, data)
            turn = TURNS.get(orientation(image))
            profile = image.info.get("icc_profile")
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"more than {MAX_PIXELS} pixels are taken for an attack ({error})"
        ) from error
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        if str(error) == "not identified by this driver":  # Pillow's words for this
            raise DataError("damaged (no width, no height or no known kind of pixels)") from error
        reason = (
            str(error) if " " in str(error) else "or of a kind that cannot be read"
        )  # some say only a number
        raise DataError(f"damaged ({reason})") from error
    if turn is not None:
        color, alpha = color.transpose(turn), alpha and alpha.transpose(turn)
    return Layers(color, alpha, profile)


def split(image: ImageFile.ImageFile, data: bytes) -> tuple[Image.Image, Image.Image | None]:
    """Color (L, RGB or CMYK) and alpha (L), with whatever form of transparency the image has."""
    if image.mode.startswith("I") or image.mode == "F":
        return split_wide(image)
    if image.has_transparency_data:
        if isinstance(image, PngImagePlugin.PngImageFile) and "transparency" in image.info:
            image.info["transparency"] = transparent_color(image, bits=data[24])
        bands = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA").split()
        return Image.merge("L" if len(bands) == 2 else "RGB", bands[:-1]), bands[-1]
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def transparent_color(image: Image.Image, bits: int) -> int | bytes | tuple[int, ...]:
    """A PNG's transparent color on the scale of its pixels: Pillow brings those to 8 bits, but not
    the color."""
    color = image.info["transparency"]
    if image.mode == "L" and bits < 8:
        return color * 255 // (2**bits - 1)
    if image.mode == "RGB" and bits == 16:
        return tuple(value >> 8 for value in color)
    return color


def split_wide(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Grey of more than 8 bits brought to 8, where Pillow's own conversion would clip it."""
    values = np.asarray(image)
    transparent = image.info.get("transparency")
    alpha = (
        None
        if transparent is None
        else Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    )
    tags = image.tag_v2 if isinstance(image, Tiff) else {}
    if image.mode == "I" and tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 1:
        values = values.view(
            np.uint32
        )  # a TIFF of 32 bits without sign, which Pillow keeps in a signed mode
    values = np.nan_to_num(values.astype(np.float32), nan=0, posinf=np.inf, neginf=0)
    if image.mode.startswith(
        "I;16"
    ):  # the format says what is white; in TIFFs 12 bits are in this mode too
        white = 2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
        if (
            tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        ):  # white is zero, which Pillow leaves as it is
            values = white - values
    else:
        peak = values[np.isfinite(values)].max(initial=0)
        whites = WHITES_OF_FLOATS if image.mode == "F" else WHITES_OF_INTEGERS
        white = next((white for most, white in whites if peak <= most), peak)
    return Image.fromarray(np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8)), alpha


def orientation(image: Image.Image) -> int:
    """EXIF's number, 1 to 8, of how to turn the image. A TIFF's is 1: Pillow turns it when it loads
    the pixels."""
    try:
        return image.getexif().get(0x0112, 1)
    except (
        Exception
    ):  # EXIF that cannot be read is ignored, as viewers do; it is no fault of the pixels
        return 1


def to_srgb(color: Image.Image, profile: bytes | None) -> Image.Image:
    """The image in sRGB, mode RGB. A profile is ignored if it is broken or made for other channels."""
    plain = color if color.mode == "RGB" else color.convert("RGB")
    if not profile:
        return plain
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space == "RGB" and color.mode != "CMYK":
            color = plain
        elif (space, color.mode) not in (("GRAY", "L"), ("CMYK", "CMYK")):
            return plain
        intent = ImageCms.Intent.PERCEPTUAL  # as browsers do
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), color.mode, "RGB", intent
        )
        if color.mode != "CMYK":
            # Most profiles are sRGB in other words. Skipping them keeps the file's exact numbers,
            # and is faster.
            sample = samples(color.mode)
            difference = ImageChops.difference(transform.apply(sample), sample.convert("RGB"))
            if max(high for _, high in difference.getextrema()) <= 1:  # type: ignore[misc]
                return plain
        return transform.apply(color)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return plain


@lru_cache
def samples(mode: str) -> Image.Image:
    """Colors from all over the range of a mode, L or RGB, to try a conversion on."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(64, 64, 3))


def window(image: Image.Image, crop: Crop, flip: bool) -> np.ndarray:
    """The crop's window of the scaled image, 0 to 255: (height, width) or (height, width, 3)
    float32.

    `box` leaves out what the crop throws away, but the filter still sees the pixels around it, so that the result is
    that of scaling all. No draft mode and no reducing_gap: both change it by more than rounding.
    """
    left, right = (
        x * image.width / crop.scaled_width for x in (crop.left, crop.left + crop.crop_width)
    )
    top, bottom = (
        y * image.height / crop.scaled_height for y in (crop.top, crop.top + crop.crop_height)
    )
    scaled = image.resize(
        (crop.crop_width, crop.crop_height), Image.Resampling.LANCZOS, (left, top, right, bottom)
    )
    array = np.asarray(scaled, dtype=np.float32)
    return array[:, ::-1].copy() if flip else array
