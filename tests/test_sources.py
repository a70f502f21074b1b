"""Finding images and captions: every form of folder, and every bad file named at once."""

import io
import shutil

import datasets
import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image

from data.config import DataConfig, DataError
from data.sources import decode, scan


def png(color=(255, 0, 0), size=(8, 8), mode="RGB", image_format="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, image_format)
    return buffer.getvalue()


def found(folder, **options):
    images, faults = scan(str(folder), DataConfig(**options))
    return {image.name: (image.caption, image.repeats) for image in images}, faults


def test_folders_may_be_nested_and_carry_kohyas_repeats(tmp_path):
    for name in ("a.png", "3_cats/b.jpg", "3_cats/deep/c.webp", "2024 trip/d.JPEG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    assert found(tmp_path) == (
        {
            "2024 trip/d.JPEG": ("caption of 2024 trip/d.JPEG", 1),
            "3_cats/b.jpg": ("caption of 3_cats/b.jpg", 3),
            "3_cats/deep/c.webp": ("caption of 3_cats/deep/c.webp", 3),
            "a.png": ("caption of a.png", 1),
        },
        [],
    )


def test_one_caption_for_many_images_is_repeated(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(png())
    assert found(tmp_path, caption="sks")[0] == {f"{n}.png": ("sks", 1) for n in "abc"}
    (tmp_path / "caption.txt").write_text("all alike")
    assert found(tmp_path) == ({f"{n}.png": ("all alike", 1) for n in "abc"}, [])


def test_any_other_mismatch_of_images_and_captions_is_a_fault(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(png())
    assert "give one caption for all as --data.caption" in found(tmp_path)[1][0]
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "d.txt").write_text("nobody's")
    faults = found(tmp_path)[1]
    assert len(faults) == 2
    assert "d.txt: a caption without an image" in faults[0]
    assert "c.png: no caption file c.txt" in faults[1]
    assert len(found(tmp_path, caption="x")[1]) == 3, "--data.caption and caption files contradict each other"


def test_another_caption_extension(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("not this")
    (tmp_path / "a.caption").write_text("this")
    assert found(tmp_path, caption_extension=".caption")[0] == {"a.png": ("this", 1)}


def test_an_empty_folder_says_what_it_holds(tmp_path):
    (tmp_path / "notes.md").write_text("")
    assert found(tmp_path)[1][0].endswith("it holds .md")


def test_a_hugging_face_dataset_on_disk(tmp_path):
    rows = {"picture": [{"bytes": png(), "path": None}] * 2, "words": ["one", "two"]}
    features = datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "single")
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "splits")
    for folder in ("single", "splits"):
        images, faults = scan(str(tmp_path / folder), DataConfig(image_column="picture", caption_column="words"))
        assert [(i.name, i.caption) for i in images] == [("row 0", "one"), ("row 1", "two")]
        assert (faults, images[0].read()) == ([], png())
    assert len(scan(str(tmp_path / "single"), DataConfig())[1]) == 2, "both wrong columns are named"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png((255, 0, 0)), (1, -1, -1)),
        (png(128, mode="L"), (0, 0, 0)),
        (png((0, 0, 0, 0), mode="RGBA"), (1, 1, 1)),
        (png((255, 0, 0), image_format="WEBP"), (1, -1, -1)),
        (png((0, 0, 0, 0), mode="CMYK", image_format="JPEG"), (1, 1, 1)),
    ],
    ids=["rgb", "grey", "transparent over white", "webp", "cmyk"],
)
def test_pixels_are_rgb_between_minus_one_and_one(data, expected):
    pixels = decode(data, 16)
    assert pixels.shape == (3, 16, 16)
    assert torch.allclose(pixels.mean((1, 2)), torch.tensor(expected, dtype=torch.float32), atol=0.03)


def test_the_centre_is_kept_and_exif_turned():
    wide = Image.fromarray(np.repeat(np.arange(32, dtype=np.uint8)[None] * 8, 16, 0))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    wide.save(buffer, "PNG", exif=exif)
    row = (decode(buffer.getvalue(), 16)[0, 0] + 1) * 127.5
    assert row.round().tolist() == [8 * i for i in range(23, 7, -1)]


@pytest.mark.parametrize("data", [b"", b"this is text", png()[:40], png(size=(64, 64))[:-30]])
def test_what_is_no_image_says_so(data):
    with pytest.raises(DataError, match=r"empty|not an image|damaged"):
        decode(data, 16)


def test_a_run_lists_all_bad_files_at_once_and_ends_with_2(options, images, tmp_path):
    (images / "zero.png").write_bytes(b"")
    (images / "text.jpg").write_text("hello")
    (images / "cut.png").write_bytes((images / "cat.png").read_bytes()[:200])
    for name in ("zero", "text", "cut"):
        shutil.copy(images / "cat.txt", images / f"{name}.txt")
    (images / "dog.txt").write_bytes(b"chien \xe9t\xe9")
    (images / "lonely.txt").write_text("no image")
    result = script(options)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    for part in ("5 faults", "zero.png: the file is empty", "text.jpg: not an image", "cut.png: damaged",
                 "dog.txt: not UTF-8", "lonely.txt: a caption without an image"):  # fmt: skip
        assert part in result.stderr
    assert not (tmp_path / "out").exists()
