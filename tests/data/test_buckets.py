"""Sizes that images are brought to."""

import math

import pytest
from helpers.data_cases import data_config

from data.media.buckets import Buckets


def buckets(**options) -> Buckets:
    only_square = options.pop("only_square", False)
    step = options.pop("step", 64)
    return Buckets.of(data_config(**{"resolution": 1024, **options}), step, only_square)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((1024, 1024), (1024, 1024)),
        ((3000, 3000), (1024, 1024)),
        ((1920, 1080), (1344, 768)),
        ((1080, 1920), (768, 1344)),
        ((2000, 1000), (1408, 704)),
        ((10000, 100), (2048, 512)),
        ((100, 10000), (512, 2048)),
    ],
)
def test_an_image_gets_the_size_of_its_shape(image, size):
    assert buckets().size(*image) == size


@pytest.mark.parametrize("shape", [0.25, 0.3, 0.5, 0.7, 0.9, 1, 1.3, 1.9, 3, 4])
@pytest.mark.parametrize("scale", [0.05, 0.3, 1, 3])
@pytest.mark.parametrize("upscale", [True, False])
def test_a_crop_lies_in_the_image_and_keeps_its_shape(shape, scale, upscale):
    width, height = round(1024 * scale * math.sqrt(shape)), round(1024 * scale / math.sqrt(shape))
    crop = buckets(upscale=upscale).crop(width, height)
    assert crop.crop_width % 64 == crop.crop_height % 64 == 0
    assert crop.crop_width * crop.crop_height <= 1024 * 1024
    assert 0 <= crop.left <= crop.scaled_width - crop.crop_width
    assert 0 <= crop.top <= crop.scaled_height - crop.crop_height
    assert crop.scaled_width == crop.crop_width or crop.scaled_height == crop.crop_height, (
        "no more is cut than must be"
    )
    assert crop.scaled_width / crop.scaled_height == pytest.approx(width / height, rel=0.02)
    if upscale or scale >= 1:  # small sizes are coarse
        assert crop.crop_width / crop.crop_height == pytest.approx(shape, rel=0.16)
    if not upscale and width * height > 4 * 64 * 64:
        assert crop.crop_width * crop.crop_height <= width * height


def test_limits_and_steps_may_be_given():
    narrow = buckets(bucket_min_side=768, bucket_max_side=1280, bucket_step=32)
    assert narrow.size(10000, 100) == (1280, 768)
    assert buckets(only_square=True).size(1920, 1080) == (1024, 1024)
    assert buckets(only_square=True, upscale=False).size(700, 500) == (448, 448)
    assert buckets(resolution=64, step=16).size(20, 20) == (64, 64)
    assert buckets(resolution=16, step=64).size(20, 20) == (64, 64), (
        "the least that the model takes"
    )
