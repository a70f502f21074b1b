"""Finding images and captions: every form of folder, and every bad file named at once."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import datasets
import pyarrow.csv
import pyarrow.parquet
import pytest
from helpers.data_cases import data_config, source_config
from helpers.project import BASE, script
from PIL import Image

from common.errors import DataError
from data.samples import ListedSample
from data.sources import open_source
from models.config import ModelConfig
from models.detect import get_family


def png(color=(255, 0, 0), size=(8, 8), mode="RGB", image_format="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, image_format)
    return buffer.getvalue()


def opened(folder, **options):
    data = data_config(path=str(folder), **options)
    return open_source(data.all_sources()[0], data, get_family(ModelConfig(path=str(BASE))), {})


def found(folder, **options):
    source = opened(folder, **options)
    samples = list(source.samples())
    return {
        e.name: (e.captions[0] if len(e.captions) == 1 else e.captions, e.repeats) for e in samples
    }, source.errors


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
    assert found(tmp_path, caption_text="sks")[0] == {f"{n}.png": ("sks", 1) for n in "abc"}
    (tmp_path / "caption.txt").write_text("all alike")
    assert found(tmp_path) == ({f"{n}.png": ("all alike", 1) for n in "abc"}, [])


def test_any_other_mismatch_of_images_and_captions_is_a_fault(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(png())
    assert "set one caption for all images with --data.captions.text" in found(tmp_path)[1][0]
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "d.txt").write_text("nobody's")
    faults = found(tmp_path)[1]
    assert len(faults) == 2
    assert "d.txt: a caption without an image" in faults[0]
    assert "c.png: no caption file c.txt next to it" in faults[1]
    assert len(found(tmp_path, caption_text="x")[1]) == 3, (
        "--data.captions.text and caption files contradict each other"
    )


def test_another_caption_extension(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("not this")
    (tmp_path / "a.caption").write_text("this")
    assert found(tmp_path, caption_extensions=(".caption",))[0] == {"a.png": ("this", 1)}
    assert found(tmp_path, caption_extensions=(".CAPTION",))[0] == {"a.png": ("this", 1)}


def test_lines_of_a_caption_file_are_captions_of_their_own(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("one, two\n\n  three \n")
    assert found(tmp_path)[0] == {"a.png": ("one, two\n\n  three", 1)}
    assert found(tmp_path, caption_one_per_line=True)[0] == {"a.png": (["one, two", "three"], 1)}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_captions_of_a_metadata_file(tmp_path, kind):
    for name in ("a.png", "b.png"):
        (tmp_path / "inside").mkdir(exist_ok=True)
        (tmp_path / "inside" / name).write_bytes(png())
    rows = [
        {"file_name": "a.png", "text": "of a", "id": 1},
        {"file_name": "b.png", "text": "of b", "id": 2},
    ]
    table = pyarrow.Table.from_pylist(rows)
    file = tmp_path / "inside" / f"metadata.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows))
    elif kind == "csv":
        pyarrow.csv.write_csv(table, file)
    else:
        pyarrow.parquet.write_table(table, file)
    assert found(tmp_path) == ({"inside/a.png": ("of a", 1), "inside/b.png": ("of b", 1)}, [])
    assert (
        "no column words (--data.captions.column)" in found(tmp_path, caption_column="words")[1][0]
    )
    source = opened(tmp_path, weight_column="id")
    assert [sample.weight for sample in source.samples()] == [1.0, 2.0]
    assert source.errors == []
    source = opened(tmp_path, weight_column="text")
    list(source.samples())
    assert "a.png has no weight of 0 or more in text: 'of a'" in source.errors[0]


def test_a_metadata_file_may_speak_of_sub_folders(tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    for name in ("a.png", "sub/b.png", "sub/deep/c.png"):
        (tmp_path / name).write_bytes(png())
    rows = [
        {"file_name": name, "text": f"of {name}"}
        for name in ("a.png", "sub/b.png", "sub/deep/c.png")
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert found(tmp_path) == ({row["file_name"]: (row["text"], 1) for row in rows}, [])
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,other\n")
    assert any(
        "is in the same folder. Keep one of the two" in fault for fault in found(tmp_path)[1]
    )


def test_every_fault_of_a_metadata_file_is_named(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    lines = [
        '{"file_name": "a.png", "text": ["one", "two"]}',
        '{"file_name": "gone.png", "text": "x"}',
    ]
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join([*lines, '{"file_name": "b.png", "text": null}'])
    )
    entries, faults = found(tmp_path)
    assert entries == {"a.png": (["one", "two"], 1)}
    assert [fault.rpartition("/")[2] for fault in faults] == [
        f"metadata.jsonl row 2: gone.png is not in {tmp_path}".rpartition("/")[2],
        "metadata.jsonl row 3: b.png has no caption in text",
        "b.png: no caption file b.txt next to it",
    ]
    (tmp_path / "metadata.jsonl").write_text("[1, 2]")
    assert "line 1 is not a JSON object" in found(tmp_path)[1][0]


def test_names_that_differ_by_case_and_links_in_a_circle(tmp_path):
    for name in ("a", "A"):
        (tmp_path / f"{name}.png").write_bytes(png())
        (tmp_path / f"{name}.txt").write_text("caption")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    entries, faults = found(tmp_path)
    assert sorted(entries) == ["A.png", "a.png"], "the folder is walked once"
    assert (
        len([fault for fault in faults if "differs from" in fault and "only by case" in fault]) == 2
    )


def test_masks_are_no_images(tmp_path):
    for name in ("a.png", "a_mask.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    source = opened(tmp_path, caption_text="x", masks="files")
    assert [(e.name, Path(e.mask_path).name) for e in source.samples()] == [("a.png", "a_mask.png")]
    assert "b.png: no mask b_mask.<extension> next to it" in source.errors[0]
    assert sorted(found(tmp_path, caption_text="x")[0]) == ["a.png", "b.png"], (
        "nor where masks are not used"
    )


def test_an_empty_folder_says_what_it_holds(tmp_path):
    (tmp_path / "notes.md").write_text("")
    assert found(tmp_path)[1][0].endswith("It holds .md")


def table(tmp_path, captions=("one", "two", "three")) -> datasets.Dataset:
    rows = {
        "picture": [{"bytes": png((i, 0, 0)), "path": None} for i in range(3)],
        "words": list(captions),
    }
    features = datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string")})
    return datasets.Dataset.from_dict(rows, features=features)


COLUMNS = {"image_column": "picture", "caption_column": "words"}


def contents(source, rows) -> list[bytes]:
    samples = [ListedSample(row, "", [], "") for row in rows]
    return [item.content for item in source.contents(samples)]


def test_a_hugging_face_dataset_on_disk(tmp_path):
    dataset = table(tmp_path)
    dataset.save_to_disk(tmp_path / "single")
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "splits")
    for folder in ("single", "splits"):
        source = opened(tmp_path / folder, **COLUMNS)
        names = [(e.name, e.captions) for e in source.samples()]
        assert names == [("row 0", ["one"]), ("row 1", ["two"]), ("row 2", ["three"])]
        assert source.errors == []
        assert contents(source, [0, 2]) == [png((0, 0, 0)), png((2, 0, 0))]
    faults = found(tmp_path / "single")[1]
    assert "no column image" in faults[0]
    assert "no column text" in faults[0], "both wrong columns are named"


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_shards_of_a_hugging_face_dataset(tmp_path, form, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "nothing is written here")
    folder, columns = tmp_path / "shards", COLUMNS
    folder.mkdir()
    if form == "parquet":
        for i in range(2):
            table(tmp_path).select(range(2 * i, min(2 * i + 2, 3))).to_parquet(
                folder / f"{i}.parquet"
            )
    else:
        columns = {"image_column": "png", "caption_column": "txt"}
        with tarfile.open(folder / "0.tar", "w") as tar:
            for i, caption in enumerate(("one", "two", "three")):
                for name, content in ((f"{i}.png", png((i, 0, 0))), (f"{i}.txt", caption.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    sources = (source_config(str(folder), streaming=streaming),)
    data = data_config(sources=sources, cache_dir=str(tmp_path / "cache"), **columns)
    source = open_source(data.all_sources()[0], data, get_family(ModelConfig(path=str(BASE))), {})
    assert [e.captions for e in source.samples()] == [["one"], ["two"], ["three"]]
    assert source.errors == []
    assert contents(source, [0, 2]) == [png((0, 0, 0)), png((2, 0, 0))]
    assert contents(source, [1]) == [png((1, 0, 0))]
    assert not (tmp_path / "nothing is written here").exists()


def test_a_dataset_that_cannot_be_had_says_so(tmp_path):
    assert "could not be loaded as a dataset" in found("nobody/nothing")[1][0]
    datasets.DatasetDict(a=table(tmp_path), b=table(tmp_path)).save_to_disk(tmp_path / "splits")
    assert "has the splits a, b. Choose one" in found(tmp_path / "splits", **COLUMNS)[1][0]
    table(tmp_path).rename_column("words", "picture2").save_to_disk(tmp_path / "text")
    faults = found(tmp_path / "text", image_column="picture2", caption_column="picture2")[1]
    assert "holds Value('string'), not images" in faults[0]


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
    for part in ("5 errors", "zero.png: the file is empty", "text.jpg: not an image", "cut.png: damaged",
                 "dog.txt: not UTF-8", "lonely.txt: a caption without an image"):  # fmt: skip
        assert part in result.stderr
    assert not (tmp_path / "out").exists()


def test_odd_files_and_names_are_faults_or_left_alone(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.symlink("a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    (tmp_path / "README.txt").write_text("no caption")
    (tmp_path / "metadata.parquet").touch()
    rows = [
        {"file_name": "a.png", "text": "a"},
        {"file_name": "b.png", "text": None},
        {"file_name": "gone.png", "text": "g"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    entries, faults = found(tmp_path)
    assert entries == {"a.png": ("a", 1)}
    for part in ("a name that is not UTF-8", "b.png has no caption", "gone.png: cannot be read"):
        assert len([fault for fault in faults if part in fault]) == 1, (part, faults)
    folder = tmp_path / "20240101123045_photos"
    folder.mkdir()
    (folder / "c.png").write_bytes(png())
    assert found(folder, caption_text="x")[0] == {"c.png": ("x", 1)}


def test_a_row_that_cannot_be_read_does_not_take_others_with_it(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(png())
    source = opened(tmp_path, caption_text="x")
    samples = list(source.samples())
    (tmp_path / "b.png").unlink()
    (tmp_path / "aa.png").write_bytes(b"new")
    read = {item.sample.row: item.content for item in source.contents(samples)}
    assert [read[0], read[2]] == [png()] * 2
    assert isinstance(read[1], DataError)


def test_a_streamed_row_is_another_when_its_column_or_file_is(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    table(tmp_path).to_parquet(folder / "0.parquet")

    def stamps(**more) -> list[str]:
        sources = (source_config(str(folder), streaming=True),)
        data = data_config(
            sources=sources, cache_dir=str(tmp_path / "cache"), **{**COLUMNS, **more}
        )
        return [
            e.stamp
            for e in open_source(
                data.all_sources()[0], data, get_family(ModelConfig(path=str(BASE))), {}
            ).samples()
        ]

    first = stamps()
    assert stamps() == first
    table(tmp_path).rename_column("picture", "other").to_parquet(folder / "0.parquet")
    assert not set(first) & set(stamps(image_column="other"))


def test_files_that_are_not_used_are_counted(tmp_path, capsys):
    (tmp_path / "a.jfif").write_bytes(png(image_format="JPEG"))
    (tmp_path / "a.TXT").write_text("a")
    for name in ("b.heic", "c.HEIC", "d.avif"):
        (tmp_path / name).write_bytes(b"")
    samples, errors = found(tmp_path)
    assert samples == {"a.jfif": ("a", 1)}
    assert not errors
    note = f"note: {tmp_path}: 3 files not used: .HEIC 1, .avif 1, .heic 1"
    assert note in capsys.readouterr().out


def test_one_caption_for_all_images_is_named(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "readme.txt").write_text("about these files")
    assert found(tmp_path)[0] == {"a.png": ("about these files", 1)}
    assert (
        f"note: {tmp_path / 'readme.txt'} is the caption of all images" in capsys.readouterr().out
    )
