"""From the bytes of an image file to pixels and masks: every format and mode, and every way to be damaged."""

import io
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from common.errors import DataError
from data.media.buckets import Crop
from data.media.images import (
    EXTENSIONS,
    MAX_PIXELS,
    ImageFacts,
    alpha_mask,
    check,
    color_error,
    mask_file,
    pixels,
)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
RNG = np.random.default_rng(0)


def encode(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def solid(mode: str, color, image_format: str = "PNG", size=(6, 4), **options) -> bytes:
    return encode(Image.new(mode, size, color), image_format, **options)


def noise(width: int, height: int) -> Image.Image:
    """Smooth colors, so that lossy formats keep them nearly."""
    small = Image.fromarray(RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def whole(width: int, height: int) -> Crop:
    """Neither scaled nor cropped."""
    return Crop(width, height, width, height, 0, 0, width, height)


def bytes_of(data: bytes, background: str = "white", flip: bool = False) -> np.ndarray:
    """The image at its own size as (height, width, 3) uint8, after checking shape, type and range."""
    facts = check(data)
    tensor = pixels(data, whole(facts.width, facts.height), background, flip)
    assert tensor.shape == (3, facts.height, facts.width)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert tensor.min() >= -1
    assert tensor.max() <= 1
    return ((tensor + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def one_color(data: bytes, background: str = "white") -> tuple[int, ...]:
    colors = {tuple(map(int, color)) for color in bytes_of(data, background).reshape(-1, 3)}
    assert len(colors) == 1, colors
    return colors.pop()


def chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def raw_png(size: tuple[int, int], bits: int, kind: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG by hand, for what Pillow does not write; every row of `rows` begins with its filter's byte."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunks)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def raw_tiff(
    values: np.ndarray, photometric: int = 1, sample_format: int = 1, bits: int = 0
) -> bytes:
    """A grey TIFF by hand, of any depth, little-endian, uncompressed."""
    height, width = values.shape
    depth = values.dtype.itemsize * 8
    bits, width = bits or depth, width * depth // (bits or depth)
    content = values.tobytes()
    tags = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 0),
        (277, 1),
        (278, height),
    ]
    tags += [(279, len(content)), (339, sample_format)]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


# Modes and formats


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG"])
def test_every_format_is_read(image_format):
    image = noise(40, 24)
    if image_format == "GIF":
        image = image.quantize(64)
    lossy = image_format in ("WEBP", "JPEG")
    data = encode(image, image_format, **({"quality": 95} if lossy else {}))
    assert check(data) == ImageFacts(40, 24, False)
    difference = np.abs(bytes_of(data).astype(int) - np.asarray(image.convert("RGB")))
    assert difference.mean() <= (4 if lossy else 0)


def test_extensions_are_of_the_formats_read():
    Image.init()
    assert {Image.EXTENSION[extension] for extension in EXTENSIONS} == set(FORMATS)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(solid("RGB", (10, 20, 30)), (10, 20, 30), id="rgb"),
        pytest.param(solid("RGB", (0, 255, 0), "BMP"), (0, 255, 0), id="bmp"),
        pytest.param(solid("L", 77), (77, 77, 77), id="grey"),
        pytest.param(solid("1", 1), (255, 255, 255), id="bit-white"),
        pytest.param(solid("1", 0, "TIFF"), (0, 0, 0), id="bit-black-tiff"),
        pytest.param(solid("1", 1, "BMP"), (255, 255, 255), id="bit-white-bmp"),
        pytest.param(solid("LA", (100, 255)), (100, 100, 100), id="grey-alpha-opaque"),
        pytest.param(solid("LA", (100, 0)), (255, 255, 255), id="grey-alpha-clear"),
        pytest.param(solid("LA", (100, 51)), (224, 224, 224), id="grey-alpha-a-fifth"),
        pytest.param(solid("RGBA", (200, 100, 0, 102)), (233, 193, 153), id="rgba-two-fifths"),
        pytest.param(solid("RGBA", (200, 100, 0, 102), "TIFF"), (233, 193, 153), id="rgba-tiff"),
        pytest.param(
            solid("RGBA", (200, 100, 0, 102), "WEBP", lossless=True),
            (233, 193, 153),
            id="rgba-webp",
        ),
        pytest.param(solid("CMYK", (0, 0, 0, 0), "TIFF"), (255, 255, 255), id="cmyk-no-ink"),
        pytest.param(solid("CMYK", (255, 0, 0, 0), "TIFF"), (0, 255, 255), id="cmyk-cyan"),
        pytest.param(solid("CMYK", (0, 255, 255, 0), "JPEG"), (255, 0, 0), id="cmyk-jpeg-red"),
        pytest.param(solid("CMYK", (0, 0, 0, 255), "JPEG"), (0, 0, 0), id="cmyk-jpeg-black"),
        pytest.param(solid("YCbCr", (128, 128, 128), "TIFF"), (128, 128, 128), id="ycbcr-tiff"),
        pytest.param(solid("I;16", 65535), (255, 255, 255), id="16bit-white"),
        pytest.param(solid("I;16", 0), (0, 0, 0), id="16bit-black"),
        pytest.param(solid("I;16", 100 * 257 + 128), (100, 100, 100), id="16bit-rounds-down"),
        pytest.param(solid("I;16", 100 * 257 + 129), (101, 101, 101), id="16bit-rounds-up"),
        pytest.param(solid("I;16", 32768, "TIFF"), (128, 128, 128), id="16bit-tiff"),
        pytest.param(solid("I;16B", 65535, "TIFF"), (255, 255, 255), id="16bit-big-endian"),
        pytest.param(solid("I", 65535, "TIFF"), (255, 255, 255), id="int-16bit-white"),
        pytest.param(solid("I", 25700, "TIFF"), (100, 100, 100), id="int-16bit-grey"),
        pytest.param(solid("I", 2**31 - 1, "TIFF"), (255, 255, 255), id="int-31bit-white"),
        pytest.param(solid("I", 200, "TIFF"), (200, 200, 200), id="int-8bit"),
        pytest.param(solid("I", -5, "TIFF"), (0, 0, 0), id="int-negative"),
        pytest.param(solid("F", 1.0, "TIFF"), (255, 255, 255), id="float-white"),
        pytest.param(solid("F", 0.2, "TIFF"), (51, 51, 51), id="float-grey"),
        pytest.param(solid("F", 1.5, "TIFF"), (255, 255, 255), id="float-highlight"),
        pytest.param(solid("F", 51.0, "TIFF"), (51, 51, 51), id="float-of-255"),
        pytest.param(solid("F", 13107.0, "TIFF"), (51, 51, 51), id="float-of-65535"),
        pytest.param(solid("F", 1e9, "TIFF"), (255, 255, 255), id="float-of-its-peak"),
        pytest.param(solid("F", float("nan"), "TIFF"), (0, 0, 0), id="float-nan"),
        pytest.param(solid("F", float("inf"), "TIFF"), (255, 255, 255), id="float-inf"),
        pytest.param(
            raw_tiff(np.full((2, 2), 2**32 - 1, "<u4")), (255, 255, 255), id="unsigned-32bit"
        ),
        pytest.param(
            raw_tiff(np.full((2, 2), 65535, "<u2"), photometric=0),
            (0, 0, 0),
            id="16bit-white-is-zero",
        ),
        pytest.param(
            raw_tiff(np.full((2, 6), 255, "u1"), bits=12), (255, 255, 255), id="12bit-white"
        ),
        pytest.param(
            raw_png((1, 1), 16, 2, b"\0" + struct.pack(">3H", 65535, 0, 25700)),
            (255, 0, 100),
            id="rgb48",
        ),
        pytest.param(
            raw_png((1, 1), 16, 4, b"\0" + struct.pack(">2H", 0, 65535)), (0, 0, 0), id="la32"
        ),
    ],
)
def test_every_mode_has_its_colors(data, expected):
    assert one_color(data) == expected


def test_lab_is_read():
    assert near(one_color(solid("LAB", (255, 128, 128), "TIFF")), (255, 255, 255))
    red = 54.3 * 2.55, 80.8 + 128, 69.9 + 128  # red of sRGB under D50
    assert near(one_color(solid("LAB", tuple(map(round, red)), "TIFF")), (255, 0, 0), 6)


def test_a_ramp_of_16_bits_keeps_its_order_and_ends():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None]
    for data in (
        encode(Image.fromarray(ramp)),
        encode(Image.fromarray(ramp.astype(np.int32)), "TIFF"),
    ):
        assert bytes_of(data)[0, :, 0].tolist() == list(range(256))


def palette_image() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    for x in range(3):
        image.putpixel((x, 0), x)
    return image


@pytest.mark.parametrize("image_format", ["PNG", "GIF", "TIFF", "BMP"])
def test_a_palette_without_transparency(image_format):
    data = encode(palette_image(), image_format)
    assert not check(data).has_alpha
    assert bytes_of(data)[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
def test_a_palette_with_one_transparent_color(image_format):
    data = encode(palette_image(), image_format, transparency=1)
    assert check(data).has_alpha
    assert bytes_of(data, "black")[0].tolist() == [[255, 0, 0], [0, 0, 0], [0, 0, 255]]
    assert alpha_mask(data, whole(3, 1)).tolist() == [[1, 0, 1]]


def test_a_palette_with_degrees_of_transparency():
    data = encode(palette_image(), transparency=bytes([0, 51, 255]))
    assert bytes_of(data)[0].tolist() == [[255, 255, 255], [204, 255, 204], [0, 0, 255]]
    assert torch.equal(alpha_mask(data, whole(3, 1)), torch.tensor([[0, 51 / 255, 1]]))


@pytest.mark.parametrize(
    ("image", "transparent"),
    [
        (Image.fromarray(np.array([[0, 90, 255]], np.uint8)), 90),
        (Image.fromarray(np.array([[[0] * 3, [1, 2, 3], [255] * 3]], np.uint8)), (1, 2, 3)),
        (Image.fromarray(np.array([[0, 300, 65535]], np.uint16)), 300),
    ],
    ids=["grey", "rgb", "16bit"],
)
def test_a_transparent_color_of_a_png(image, transparent):
    data = encode(image, transparency=transparent)
    assert check(data).has_alpha
    assert bytes_of(data, "#ff0000")[0].tolist() == [[0, 0, 0], [255, 0, 0], [255, 255, 255]]
    assert alpha_mask(data, whole(3, 1)).tolist() == [[1, 0, 1]]


def test_a_transparent_color_of_depths_that_pillow_rescales():
    one_bit = raw_png((2, 1), 1, 0, b"\0\x40", chunk(b"tRNS", struct.pack(">H", 1)))
    assert bytes_of(one_bit, "red")[0].tolist() == [[0, 0, 0], [255, 0, 0]]
    four_bits = raw_png((2, 1), 4, 0, b"\0\x5f", chunk(b"tRNS", struct.pack(">H", 5)))
    assert bytes_of(four_bits, "red")[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    colors = struct.pack(">6H", 300, 0, 65535, 0, 0, 0)
    deep = raw_png((2, 1), 16, 2, b"\0" + colors, chunk(b"tRNS", struct.pack(">3H", 300, 0, 65535)))
    assert bytes_of(deep, "lime")[0].tolist() == [[0, 255, 0], [0, 0, 0]]


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_counts(image_format):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert one_color(data) == (255, 0, 0)


def test_of_a_jpeg_of_several_pictures_the_first_counts():
    data = encode(
        Image.new("RGB", (8, 8), "red"),
        "MPO",
        save_all=True,
        append_images=[Image.new("RGB", (16, 8))],
    )
    assert check(data) == ImageFacts(8, 8, False)
    assert one_color(data)[0] >= 253


# EXIF

A, B, C, D, E, F = (40 * i for i in range(1, 7))
SHOWN = {  # [[A, B, C], [D, E, F]] as stored -> as shown, from the definition of where row 0 and column 0 are
    1: [[A, B, C], [D, E, F]],
    2: [[C, B, A], [F, E, D]],
    3: [[F, E, D], [C, B, A]],
    4: [[D, E, F], [A, B, C]],
    5: [[A, D], [B, E], [C, F]],
    6: [[D, A], [E, B], [F, C]],
    7: [[F, C], [E, B], [D, A]],
    8: [[C, F], [B, E], [A, D]],
}


def turned(number: int, image: Image.Image, image_format: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return encode(
        image, image_format, exif=exif, **({"lossless": True} if image_format == "WEBP" else {})
    )


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("number", SHOWN)
def test_images_are_turned_as_their_exif_says(number, image_format):
    stored = Image.fromarray(np.array(SHOWN[1], np.uint8)).convert("RGB")
    shown = np.array(SHOWN[number])
    data = turned(number, stored, image_format)
    assert check(data) == ImageFacts(shown.shape[1], shown.shape[0], False)
    assert bytes_of(data)[..., 0].tolist() == shown.tolist()
    assert bytes_of(data, flip=True)[..., 0].tolist() == shown[:, ::-1].tolist()


@pytest.mark.parametrize("number", SHOWN)
def test_jpegs_and_alpha_are_turned_too(number):
    stored = np.array(SHOWN[1], np.uint8)
    big = Image.fromarray(stored).resize((24, 16), Image.Resampling.NEAREST)
    jpeg = bytes_of(turned(number, big, "JPEG"))[4::8, 4::8, 0]
    assert np.abs(jpeg.astype(int) - SHOWN[number]).max() <= 2
    alpha = Image.merge("LA", (Image.new("L", (3, 2)), Image.fromarray(stored)))
    height, width = np.shape(SHOWN[number])
    mask = alpha_mask(turned(number, alpha, "PNG"), whole(width, height))
    assert torch.equal(mask, torch.tensor(SHOWN[number]) / 255)
    assert torch.equal(
        mask_file(turned(number, Image.fromarray(stored), "PNG"), whole(width, height)), mask
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff"]
)
def test_broken_exif_is_ignored(exif):
    assert one_color(encode(Image.new("RGB", (8, 8), "white"), "JPEG", exif=exif)) == (
        255,
        255,
        255,
    )


def test_an_unknown_orientation_is_none():
    assert bytes_of(turned(9, Image.new("L", (3, 2)), "PNG")).shape == (2, 3, 3)


# Color profiles


def s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2.1, of a display."""
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78), **tags}
    tags[b"wtpt"] = b"XYZ " + bytes(4) + s15(0.9642) + s15(1) + s15(0.8249)
    table, content = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(content), len(value))
        content += value + bytes(-len(value) % 4)
    header = struct.pack(
        ">I4sI4s4s4s", start + len(content), b"test", 0x02100000, b"mntr", space, b"XYZ "
    )
    header += (
        struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
        + b"acsp"
        + bytes(28)
        + s15(0.9642)
        + s15(1)
        + s15(0.8249)
    )
    return header.ljust(128, b"\0") + table + content


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


# Red and green exchanged: primaries of sRGB, adapted to D50, in another order, so that the expected colors are plain.
PRIMARIES = {
    "r": (0.4361, 0.2225, 0.0139),
    "g": (0.3851, 0.7169, 0.0971),
    "b": (0.1431, 0.0606, 0.7141),
}


def rgb_profile(order: str = "rgb", exponent: float = 2.2) -> bytes:
    tags = {}
    for channel, primary in zip("rgb", order, strict=True):
        tags[f"{channel}XYZ".encode()] = b"XYZ " + bytes(4) + b"".join(map(s15, PRIMARIES[primary]))
        tags[f"{channel}TRC".encode()] = gamma(exponent)
    return profile(b"RGB ", tags)


GREY_LINEAR = profile(b"GRAY", {b"kTRC": gamma(1.0)})
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
EXCHANGED = rgb_profile("grb")


def near(color: tuple[int, ...], expected: tuple[int, ...], most: int = 2) -> bool:
    return max(abs(a - b) for a, b in zip(color, expected, strict=True)) <= most


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colors_of_another_profile_become_srgb(image_format):
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = solid("RGB", (255, 0, 0), image_format, (16, 16), icc_profile=EXCHANGED, **options)
    assert near(one_color(data), (0, 255, 0), 6 if image_format == "JPEG" else 2)
    assert one_color(solid("RGB", (255, 0, 0))) == (255, 0, 0)


def test_profiles_reach_alpha_palettes_and_grey():
    assert near(one_color(solid("RGBA", (255, 0, 0, 255), icc_profile=EXCHANGED)), (0, 255, 0))
    half = solid("RGBA", (255, 0, 0, 51), icc_profile=EXCHANGED)
    assert near(one_color(half, "black"), (0, 51, 0))  # the background is sRGB already
    assert near(
        tuple(map(int, bytes_of(encode(palette_image(), icc_profile=EXCHANGED))[0, 0])), (0, 255, 0)
    )
    linear = 188  # of sRGB, for 128 of 255 on a linear scale
    for mode, color in (("L", 128), ("LA", (128, 255)), ("I;16", 128 * 257)):
        assert near(one_color(solid(mode, color, icc_profile=GREY_LINEAR)), (linear,) * 3), mode
        assert near(
            one_color(solid(mode, color, icc_profile=rgb_profile(exponent=1))), (linear,) * 3
        ), mode


def test_an_srgb_profile_changes_no_number():
    image = noise(64, 64)
    assert np.array_equal(bytes_of(encode(image, icc_profile=SRGB)), np.asarray(image))


def test_cmyk_with_a_profile_is_converted_by_it():
    data = solid("CMYK", (255, 0, 0, 0), "TIFF", icc_profile=cmyk_profile())
    assert one_color(solid("CMYK", (255, 0, 0, 0), "TIFF")) == (0, 255, 255)
    assert near(
        one_color(data), (119, 119, 119), 3
    )  # Lab lightness 50, as the table has it for full cyan
    white = solid("CMYK", (0, 0, 0, 0), "JPEG", (16, 16), icc_profile=cmyk_profile())
    assert near(one_color(white), (255, 255, 255), 3)


def cmyk_profile() -> bytes:
    """Grey only: each ink takes 50 off the lightness of 100."""
    grid = []
    for index in range(16):
        inks = bin(index).count("1")
        grid += [max(0, 255 - round(127.5 * inks)), 128, 128]
    identity = bytes(range(256))
    matrix = b"".join(map(s15, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = (
        b"mft1"
        + bytes(4)
        + bytes([4, 3, 2, 0])
        + matrix
        + identity * 4
        + bytes(grid)
        + identity * 3
    )
    made = bytearray(profile(b"CMYK", {b"A2B0": table}))
    made[12:16], made[20:24] = b"prtr", b"Lab "
    return bytes(made)


@pytest.mark.parametrize(
    "broken",
    [
        b"no profile",
        b"\0" * 200,
        EXCHANGED[:200],
        EXCHANGED[:128] + b"\xff" * 300,
        cmyk_profile(),
        GREY_LINEAR,
    ],
    ids=["text", "zeros", "cut", "table", "of-cmyk", "of-grey"],
)
def test_a_profile_that_does_not_work_is_ignored(broken):
    assert one_color(solid("RGB", (255, 0, 100), icc_profile=broken)) == (255, 0, 100)
    assert one_color(solid("RGB", (255, 0, 100), "TIFF", icc_profile=broken)) == (255, 0, 100)


def test_a_cmyk_image_with_a_profile_of_rgb_ignores_it():
    assert one_color(solid("CMYK", (0, 255, 255, 0), "TIFF", icc_profile=EXCHANGED)) == (255, 0, 0)


# Faults


def fault(data: bytes) -> str:
    """What is wrong, as all that read a file say it."""
    crop = whole(4, 4)
    messages = set()
    for read in (
        check,
        lambda d: pixels(d, crop, "white"),
        lambda d: alpha_mask(d, crop),
        lambda d: mask_file(d, crop),
    ):
        with pytest.raises(DataError) as raised:
            read(data)
        messages.add(str(raised.value))
    assert len(messages) == 1
    return messages.pop()


def test_what_is_no_image_says_so():
    assert fault(b"") == "the file is empty"
    for data in (b"hello", b"<html>", b"\0", b"RIFF\0\0\0\0WAVEfmt ", b"%PDF-1.4"):
        assert fault(data).startswith("not an image")
    for data in (
        b"BM",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"II*\0",
        b"MM\0*",
        b"RIFF\0\0\0\0WEBP",
    ):
        assert fault(data).startswith("damaged"), data


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_cut_off_files_are_damaged(image_format, share):
    image = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(image, image_format)
    assert fault(data[: int(len(data) * share)]).startswith("damaged")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "options", [{"compression": c} for c in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")]
)
def test_cut_off_compressed_tiffs_are_damaged(options):
    image = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(image, "TIFF", **options)
    check(data)
    assert fault(data[: len(data) // 2]).startswith("damaged")


@pytest.mark.parametrize("image_format", FORMATS)
def test_changed_bytes_raise_nothing_but_data_errors(image_format):
    data = encode(
        noise(16, 16).convert("RGBA" if image_format in ("PNG", "WEBP") else "RGB"), image_format
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about the damage
        for _ in range(60):
            changed = bytearray(data)
            for place in RNG.integers(0, min(len(data), 400), 3):
                changed[place] = RNG.integers(256)
            try:
                facts = check(bytes(changed))
            except DataError:
                continue
            if facts.width * facts.height < 10**6:
                bytes_of(bytes(changed))


def png_header(width: int, height: int) -> bytes:
    return raw_png((width, height), 8, 0, b"")


def bomb(image_format: str, width: int, height: int) -> bytes:
    """A small file whose header says width x height."""
    if image_format == "PNG":
        return png_header(width, height)
    data = bytearray(solid("RGB", 0, image_format, (8, 8)))
    if image_format == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif image_format == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif image_format == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", height, width)
    else:
        for tag, value in ((256, width), (257, height)):
            start = max(data.find(struct.pack("<HHI", tag, kind, 1)) for kind in (3, 4))
            data[start : start + 12] = struct.pack("<HHII", tag, 4, 1, value)
    return bytes(data)


@pytest.mark.parametrize("limit", [None, 1, Image.MAX_IMAGE_PIXELS])
@pytest.mark.parametrize("image_format", ["PNG", "BMP", "GIF", "JPEG", "TIFF"])
def test_bombs_are_refused_before_they_are_decoded(image_format, limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    data = bomb(image_format, 2**14 + 1, 2**14)
    assert fault(data) == f"16385x16384 pixels are more than the limit of {MAX_PIXELS} pixels"
    assert limit == Image.MAX_IMAGE_PIXELS


def test_what_is_at_the_limit_is_decoded(monkeypatch):
    assert MAX_PIXELS == 2**28
    monkeypatch.setattr("data.media.images.MAX_PIXELS", 64)
    check(solid("RGB", 0, size=(8, 8)))
    assert "9x8" in fault(solid("RGB", 0, size=(9, 8)))


@pytest.mark.parametrize("image_format", FORMATS)
def test_pillows_limit_neither_counts_nor_changes(image_format, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(solid("RGB", 0, image_format, (8, 8))) == ImageFacts(8, 8, False)
    assert Image.MAX_IMAGE_PIXELS == 10


def outgrown(side: int) -> bytes:
    """A GIF whose frame is larger than its screen, and is to be disposed of, which makes Pillow ask its own limit."""
    frame = b"!\xf9\x04\x08\0\0\0\0" + b"," + struct.pack("<HHHHB", 0, 0, side, side, 0)
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0)
        + bytes(6)
        + frame
        + b"\x02\x02\x44\x01\0;"
    )


def test_a_frame_larger_than_its_screen_counts():
    assert "more than the limit of" in fault(outgrown(2**14 + 1))


def test_threads_leave_pillows_limit_alone(monkeypatch):
    before = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    good, start = solid("RGB", (1, 2, 3), "WEBP", (8, 8), lossless=True), threading.Barrier(4)

    def work(_):
        start.wait()
        return [check(good) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        found = [facts for part in pool.map(work, range(4)) for facts in part]
    assert found == [ImageFacts(8, 8, False)] * 200
    assert Image.MAX_IMAGE_PIXELS == 10
    assert before is not None


@pytest.mark.parametrize("size", [(0, 8), (8, 0), (0, 0)])
def test_no_area_is_damaged(size):
    assert fault(png_header(*size)) == "damaged (no width, no height or an unknown kind of pixels)"
    for image_format in ("BMP", "JPEG", "TIFF"):
        assert fault(bomb(image_format, *size)).startswith("damaged"), image_format


# Scaling, crop, flip, background


@pytest.mark.parametrize(
    "crop",
    [
        Crop(97, 61, 64, 40, 12, 0, 40, 40),
        Crop(97, 61, 51, 32, 9, 0, 32, 32),
        Crop(97, 61, 300, 189, 55, 30, 128, 128),
        Crop(97, 61, 97, 61, 10, 5, 64, 48),
        Crop(97, 61, 40, 80, 0, 8, 40, 64),
        Crop(97, 61, 64, 40, 24, 0, 40, 40),
    ],
    ids=["down", "far-down", "up", "as-it-is", "squeezed", "to-the-edge"],
)
def test_the_window_is_that_of_the_whole_scaled_image(crop):
    image = Image.fromarray(RNG.integers(0, 256, (61, 97, 3), dtype=np.uint8))
    scaled = np.asarray(
        image.resize((crop.scaled_width, crop.scaled_height), Image.Resampling.LANCZOS)
    )
    expected = scaled[
        crop.top : crop.top + crop.crop_height, crop.left : crop.left + crop.crop_width
    ]
    found = pixels(encode(image), crop, "white")
    assert found.shape == (3, crop.crop_height, crop.crop_width)
    difference = ((found.permute(1, 2, 0).numpy() + 1) * 127.5 - expected).round()
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.001
    mirrored = pixels(encode(image), crop, "white", flip=True)
    assert torch.equal(mirrored, found.flip(-1))


def test_ends_of_the_range_are_exact():
    assert pixels(solid("RGB", (0, 0, 0)), whole(6, 4), "white").eq(-1).all()
    assert pixels(solid("RGB", (255, 255, 255)), whole(6, 4), "white").eq(1).all()


def test_alpha_is_laid_over_the_background():
    clear = solid("RGBA", (1, 2, 3, 0))
    assert one_color(clear) == (255, 255, 255)
    assert one_color(clear, "Black") == (0, 0, 0)
    assert one_color(clear, "#1a2B3c") == (0x1A, 0x2B, 0x3C)
    assert one_color(solid("LA", (255, 102)), "red") == (255, 102, 102)


def test_hidden_colors_do_not_bleed_into_edges():
    """What is transparent may hold any color; scaling must not mix it in."""
    array = np.zeros((32, 32, 4), np.uint8)
    array[:, :16] = (255, 255, 255, 255)
    array[:, 16:] = (255, 0, 0, 0)
    found = pixels(encode(Image.fromarray(array)), Crop(32, 32, 9, 9, 0, 0, 9, 9), "white")
    assert found.eq(1).all()


@pytest.mark.parametrize("color", ["white", "White", "rebeccapurple", "#00ff7F"])
def test_colors(color):
    assert color_error(color) is None


@pytest.mark.parametrize(
    "color", ["", "whit", "#fff", "#ggg000", "#ffffff80", "ffffff", "rgb(1,2,3)", "#ffffff\n"]
)
def test_what_is_no_color(color):
    assert repr(color) in color_error(color)
    with pytest.raises(DataError, match="is not a color"):
        pixels(solid("RGB", 0), whole(6, 4), color)


# Masks


def test_alpha_is_a_mask():
    array = np.zeros((4, 6, 4), np.uint8)
    array[:, :3, 3], array[:, 3, 3] = 255, 102
    expected = torch.tensor([[1, 1, 1, 0.4, 0, 0]]).expand(4, 6)
    for image_format, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        data = encode(Image.fromarray(array), image_format, **options)
        assert check(data).has_alpha
        torch.testing.assert_close(alpha_mask(data, whole(6, 4)), expected)
        torch.testing.assert_close(alpha_mask(data, whole(6, 4), flip=True), expected.flip(-1))
    ones = alpha_mask(solid("RGB", 0, "JPEG"), Crop(6, 4, 12, 8, 2, 0, 8, 8))
    assert torch.equal(ones, torch.ones(8, 8))


def test_masks_are_scaled_and_cropped_as_their_image():
    grey = Image.fromarray(RNG.integers(0, 256, (50, 90), dtype=np.uint8))
    crop = Crop(90, 50, 54, 30, 12, 0, 30, 30)
    image = Image.merge("RGBA", (grey, grey, grey, grey))
    expected = (pixels(encode(grey), crop, "white")[0] + 1) / 2
    torch.testing.assert_close(mask_file(encode(grey), crop), expected)
    torch.testing.assert_close(alpha_mask(encode(image), crop), expected)
    torch.testing.assert_close(mask_file(encode(grey), crop, flip=True), expected.flip(-1))
    assert expected.min() >= 0
    assert expected.max() <= 1


def test_a_mask_may_have_another_size():
    mask = np.zeros((20, 40), np.uint8)
    mask[:, 20:] = 255  # the right half
    found = mask_file(encode(Image.fromarray(mask)), Crop(400, 200, 80, 40, 20, 0, 40, 40))
    assert found.shape == (40, 40)
    assert found[:, :16].max() < 0.02
    assert found[:, 24:].min() > 0.98


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (solid("1", 1), 1),
        (solid("L", 51), 0.2),
        (solid("RGB", (255, 255, 255), "JPEG"), 1),
        (solid("RGB", (255, 0, 0)), 76 / 255),
        (solid("LA", (255, 51)), 0.2),
        (solid("RGBA", (255, 255, 255, 0)), 0),
        (solid("CMYK", (0, 0, 0, 0), "TIFF"), 1),
        (solid("I;16", 13107), 0.2),
        (solid("F", 0.2, "TIFF"), 0.2),
        (encode(palette_image().crop((2, 0, 3, 1)).resize((6, 4))), 29 / 255),
        (solid("L", 51, icc_profile=GREY_LINEAR), 0.2),
    ],
    ids=[
        "bit",
        "grey",
        "rgb",
        "red",
        "grey-alpha",
        "clear",
        "cmyk",
        "16bit",
        "float",
        "palette",
        "profile",
    ],
)
def test_a_mask_is_brightness_in_any_mode(data, expected):
    found = mask_file(data, whole(6, 4))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((4, 6), float(expected)))
