"""Pixels and masks from the content of image files. No other file opens images."""

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

EXTENSIONS = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
MAX_PIXELS = 2**28
"""Largest number of pixels; files that claim more are usually made to exhaust the memory."""
PILLOW_LIMIT_LOCK = threading.Lock()
EXIF_ORIENTATION = 0x0112
ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
INTEGER_WHITES = ((255, 255), (65535, 65535), (2**31 - 1, 2**31 - 1), (2**32 - 1, 2**32 - 1))
"""(largest pixel, white): scales of integer files that do not state theirs. The first entry that no
pixel exceeds is used."""
FLOAT_WHITES = ((16, 1), (255, 255), (65535, 65535))
"""The same for floats. They are usually 0..1, and highlights above 1 are common, so only much
larger pixels indicate another scale."""
Result = TypeVar("Result")


def with_pixel_limit(read: Callable[[], Result]) -> Result:
    """Call `read` with the limit MAX_PIXELS. It must be quick, and may be called twice.

    Some of Pillow's readers check Pillow's global limit, which other code may have changed. If the
    limit is exceeded, it is replaced for a moment. Raises Image.DecompressionBombError above
    MAX_PIXELS."""
    try:
        return read()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        with PILLOW_LIMIT_LOCK:
            earlier_limit = Image.MAX_IMAGE_PIXELS
            Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow raises the error above twice this
            try:
                return read()
            finally:
                Image.MAX_IMAGE_PIXELS = earlier_limit


class Tiff(TiffImagePlugin.TiffImageFile):
    """Pillow's reader, which checks Pillow's limit once more before it allocates the pixels."""

    def load_prepare(self) -> None:
        with_pixel_limit(super().load_prepare)


ImageReader = Callable[[io.BytesIO], ImageFile.ImageFile]
READERS: tuple[tuple[re.Pattern[bytes], ImageReader], ...] = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), Tiff),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
)
"""Start of a file -> Pillow's reader. The name of a file does not count.

Image.open is not used, because it checks Pillow's global limit, which other code may have changed.
Only the first picture of a JPEG with several pictures (MPO) is read. Errors in the index of its
pictures do not matter."""


@dataclass(frozen=True)
class ImageFacts:
    """Size in pixels of an image after its EXIF rotation, and whether it has any transparency."""

    width: int
    height: int
    has_alpha: bool


@dataclass(frozen=True, eq=False)
class Layers:
    """A decoded image after its EXIF rotation: `color` (mode L, RGB or CMYK, in the colors of
    `profile`) and `alpha` (mode L)."""

    color: Image.Image
    alpha: Image.Image | None
    profile: bytes | None


def check(data: bytes) -> ImageFacts:
    """Decode the first frame of a file. Raises DataError with the reason why it cannot be used."""
    layers = decode(data)
    return ImageFacts(layers.color.width, layers.color.height, layers.alpha is not None)


def pixels(data: bytes, crop: Crop, background: str | None, flip: bool = False) -> Tensor:
    """Return an image's sRGB colors over `background`; None: as stored, also if they are transparent.

    They are (3, crop_height, crop_width) float32 in [-1, 1]. `flip` mirrors the window
    horizontally. Raises DataError as check() does, and if `background` is not a color."""
    error = None if background is None else color_error(background)
    if error:
        raise DataError(error)
    return scale(picture(data, background), crop, flip)


def picture(data: bytes, background: str | None) -> Image.Image:
    """Return an image in its own size, in sRGB over `background`. Raises DataError as check() does."""
    layers = decode(data)
    srgb = to_srgb(layers.color, layers.profile)
    if background is None:
        return srgb.convert("RGB")
    return paste_over(srgb, background, layers.alpha)


def paste_over(
    image: Image.Image, background: str, alpha: Image.Image | None = None
) -> Image.Image:
    """Return the image in RGB over `background`, which shows where `alpha` is not opaque.

    An RGBA image brings its own alpha."""
    if alpha is None and image.mode == "RGBA":
        alpha = image.getchannel("A")
    if alpha is None:
        return image
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=alpha)
    return canvas


def scale(image: Image.Image, crop: Crop, flip: bool) -> Tensor:
    """Return the crop of an RGB image, (3, crop_height, crop_width) float32 in [-1, 1]."""
    array = crop_window(image, crop, flip) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def alpha_mask(data: bytes, crop: Crop, flip: bool = False) -> Tensor:
    """Return the opacity of an image, (crop_height, crop_width) float32 in [0, 1].

    It is 1 everywhere in images without transparency. Raises DataError as check() does."""
    alpha = decode(data).alpha
    if alpha is None:
        return torch.ones(crop.crop_height, crop.crop_width)
    return torch.from_numpy(crop_window(alpha, crop, flip) / 255)


def mask_levels(data: bytes) -> Image.Image:
    """Return a mask image's brightness. Raises DataError as check() does."""
    layers = decode(data)
    levels = layers.color.convert("RGB").convert("L")
    if layers.alpha is not None:
        levels = ImageChops.multiply(levels, layers.alpha)
    return levels


def brightest_level(data: bytes) -> int:
    """Return the brightest level of a mask image, up to 255. Raises DataError as check() does."""
    levels = mask_levels(data)
    return int(np.asarray(levels).max())


def mask_file(data: bytes, crop: Crop, flip: bool = False) -> Tensor:
    """Return a mask image's brightness, (crop_height, crop_width) float32 in [0, 1].

    Transparent pixels count as black, and a color profile does not matter. `crop` is that of the
    image which the mask belongs to. The mask may have another size: all of it is scaled to the
    scaled size of the crop. Raises DataError as check() does."""
    levels = mask_levels(data)
    return torch.from_numpy(crop_window(levels, crop, flip) / 255)


def color_error(background: str) -> str | None:
    """Return an error unless `background` is a color name of CSS or #rrggbb."""
    if background.lower() in ImageColor.colormap or re.fullmatch(r"#[0-9a-fA-F]{6}", background):
        return None
    return f"{background!r} is not a color. Use a name such as white, black or gray, or #rrggbb"


def reader_of(data: bytes) -> ImageReader | None:
    """Return the reader for a file; None if it is not in an image format."""
    for start, reader in READERS:
        if start.match(data):
            return reader
    return None


def check_num_pixels(width: int, height: int) -> None:
    """Raise DataError if an image is too large."""
    if width * height > MAX_PIXELS:
        raise DataError(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS} pixels")


def decode(data: bytes) -> Layers:
    """Return the first frame of a file, with its EXIF rotation.

    Raises DataError with the reason if it cannot be decoded."""
    if not data:
        raise DataError("the file is empty")
    reader = reader_of(data)
    if reader is None:
        raise DataError("not an image (PNG, JPEG, WebP, GIF, TIFF or BMP)")
    try:
        with with_pixel_limit(lambda: reader(io.BytesIO(data))) as image:
            check_num_pixels(*image.size)
            image.load()
            color, alpha = split_alpha(image, data)
            rotation = ROTATIONS.get(orientation(image))
            profile = image.info.get("icc_profile")
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"more than the limit of {MAX_PIXELS} pixels ({error})") from error
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        raise DataError(f"damaged ({damage_reason(error)})") from error
    if rotation is not None:
        color = color.transpose(rotation)
        alpha = alpha and alpha.transpose(rotation)
    return Layers(color, alpha, profile)


def damage_reason(error: Exception) -> str:
    """Return the message of an error of Pillow, or a better one."""
    message = str(error)
    if message == "not identified by this driver":
        return "no width, no height or an unknown kind of pixels"
    if " " in message:
        return message
    return "or not supported"  # some messages are only a number


def split_alpha(image: ImageFile.ImageFile, data: bytes) -> tuple[Image.Image, Image.Image | None]:
    """Return color (L, RGB or CMYK) and alpha (L), from any form of transparency."""
    if image.mode.startswith("I") or image.mode == "F":
        return split_wide(image)
    if image.has_transparency_data:
        if isinstance(image, PngImagePlugin.PngImageFile) and "transparency" in image.info:
            image.info["transparency"] = transparent_color(image, bits=data[24])
        bands = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA").split()
        color_mode = "L" if len(bands) == 2 else "RGB"
        return Image.merge(color_mode, bands[:-1]), bands[-1]
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def transparent_color(image: Image.Image, bits: int) -> int | bytes | tuple[int, ...]:
    """Return a PNG's transparent color on the scale of its pixels.

    Pillow converts the pixels to 8 bits, but not this color."""
    color = image.info["transparency"]
    if image.mode == "L" and bits < 8:
        return color * 255 // (2**bits - 1)
    if image.mode == "RGB" and bits == 16:
        return tuple(value >> 8 for value in color)
    return color


def split_wide(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return color and alpha of a gray image with more than 8 bits, converted to 8 bits.

    Pillow's own conversion would clip the pixels."""
    values = np.asarray(image)
    alpha = None
    transparent = image.info.get("transparency")
    if transparent is not None:
        opacity = np.where(values == transparent, 0, 255)
        alpha = Image.fromarray(opacity.astype(np.uint8))
    tags = image.tag_v2 if isinstance(image, Tiff) else {}
    if image.mode == "I" and tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 1:  # unsigned
        values = values.view(np.uint32)  # a TIFF of 32 bits, which Pillow keeps in a signed mode
    values = np.nan_to_num(values.astype(np.float32), nan=0, posinf=np.inf, neginf=0)
    if image.mode.startswith("I;16"):  # the mode of TIFFs with 12 bits too
        white = 2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
            values = white - values  # white is zero in the file, and Pillow does not change that
    else:
        white = white_of(values, FLOAT_WHITES if image.mode == "F" else INTEGER_WHITES)
    gray = np.rint(np.clip(values / white, 0, 1) * 255)
    return Image.fromarray(gray.astype(np.uint8)), alpha


def white_of(values: np.ndarray, whites: tuple[tuple[int, int], ...]) -> float:
    """Return the white of pixels whose file does not state it."""
    peak = values[np.isfinite(values)].max(initial=0)
    for largest_pixel, white in whites:
        if peak <= largest_pixel:
            return white
    return peak


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8. It is 1 for a TIFF, which Pillow rotates on loading."""
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # viewers ignore unreadable EXIF too; the pixels are intact
        return 1


def to_srgb(color: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the image in sRGB, mode RGB.

    A profile is ignored if it is damaged or made for other channels."""
    unconverted = color if color.mode == "RGB" else color.convert("RGB")
    if not profile:
        return unconverted
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space == "RGB" and color.mode != "CMYK":
            color = unconverted
        elif (space, color.mode) not in (("GRAY", "L"), ("CMYK", "CMYK")):
            return unconverted
        srgb = ImageCms.createProfile("sRGB")
        intent = ImageCms.Intent.PERCEPTUAL  # as browsers do
        transform = ImageCms.buildTransform(source, srgb, color.mode, "RGB", intent)
        if color.mode != "CMYK" and is_nearly_srgb(transform, color.mode):
            return unconverted
        return transform.apply(color)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return unconverted


def is_nearly_srgb(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether a conversion to sRGB changes no color by more than 1.

    Most profiles describe sRGB in other words. Skipping them keeps the exact numbers of the file,
    and is faster."""
    colors = sample_colors(mode)
    difference = ImageChops.difference(transform.apply(colors), colors.convert("RGB"))
    return max(high for _, high in difference.getextrema()) <= 1  # type: ignore[misc]


@lru_cache
def sample_colors(mode: str) -> Image.Image:
    """Return an image with colors from the whole range of a mode, L or RGB."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    colors = np.stack(np.meshgrid(steps, steps, steps), axis=-1)
    return Image.fromarray(colors.reshape(64, 64, 3))


def crop_window(image: Image.Image, crop: Crop, flip: bool) -> np.ndarray:
    """Return the crop of the image, 0 to 255: (height, width) or (height, width, 3) float32.

    Only the window is scaled, but the filter sees the pixels around it, so the result is the same
    as scaling all. Draft mode and reducing_gap would change it by more than rounding."""
    right = crop.left + crop.crop_width
    bottom = crop.top + crop.crop_height
    box = (
        crop.left * image.width / crop.scaled_width,
        crop.top * image.height / crop.scaled_height,
        right * image.width / crop.scaled_width,
        bottom * image.height / crop.scaled_height,
    )
    size = (crop.crop_width, crop.crop_height)
    scaled = image.resize(size, Image.Resampling.LANCZOS, box)
    array = np.asarray(scaled, dtype=np.float32)
    return array[:, ::-1].copy() if flip else array
