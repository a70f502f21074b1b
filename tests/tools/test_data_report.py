"""`train_lora.py data`: the report on small folders with many problems, and the sheets."""

import json
import re
import shlex

import datasets
import numpy as np
import pytest
import torch
import yaml
from helpers.data_cases import SINGLE_PROCESS, data_config
from helpers.project import BASE, PROJECT, TWEMOJI, reset_accelerate
from PIL import Image

import train_lora
from data.export import write_dataset
from data.media.buckets import Crop
from data.media.images import pixels
from data.precompute.build import DatasetBuilder, build_datasets
from data.store.store import Store
from models.base import cond_bytes
from models.config import ModelConfig
from models.detect import get_family
from tools.data import contact_sheets, counts

LONG = " ".join(["face"] * 40)
PAGE = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")


def image(path, size=(64, 64), color=(200, 30, 30), caption: str | None = "a face"):
    """Write an image with unique content, and its caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, color)
    picture.putpixel(
        (0, 0), tuple(np.random.default_rng(list(path.name.encode())).integers(0, 255, 3).tolist())
    )
    picture.save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def odd(tmp_path):
    """Write seven images: two copies, a small one, a wide one; empty, long and non-Latin captions."""
    folder = tmp_path / "odd"
    image(folder / "a.png", caption="sks face")
    image(folder / "b.png", caption="a face")
    (folder / "again.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "again.txt").write_text("another face")
    image(folder / "small.png", (32, 40), caption="sks")
    image(
        folder / "3_wide" / "wide.png",
        (160, 64),
        (30, 30, 200),
        caption="\u9854 \U0001f600 \u0643 sks",
    )
    image(folder / "long.png", caption=f"sks {LONG}")
    image(folder / "nothing.png", caption="")
    return folder


@pytest.fixture
def told(tmp_path, run_here, capsys):
    """Return a function that runs the command, and returns exit code, stdout and stderr."""

    def run(*options, images=None, recipe=()):
        argv = [
            "data",
            *recipe,
            f"--model.path={BASE}",
            f"--data.cache_dir={tmp_path / 'cache'}",
            "--data.resolution=64",
        ]
        argv += [f"--data.path={images}"] if images is not None else []
        code = run_here([*argv, *map(str, options)])
        return code, *capsys.readouterr()

    return run


def fact(report: str, name: str) -> list[str]:
    """Return the value of a fact, and its further lines."""
    lines = report.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"  {name}  "))
    margin = re.match(r"  .*?\S  +(?=\S)", lines[at].replace(name, "x" * len(name))).end()
    below = []
    for line in lines[at + 1 :]:
        if not line.startswith(" " * (margin + 2)):
            break
        below.append(line.strip())
    return [lines[at][2 + len(name) :].strip(), *below]


def table(report: str, section: str) -> list[list[str]]:
    """Return the cells of a section's table."""
    lines = (
        report.split(f"\n{section}\n" if section != "sources" else "sources\n")[1]
        .split("\n\n")[0]
        .splitlines()
    )
    return [re.split(r"  +", line.strip()) for line in lines]


def test_everything_odd_is_counted_and_named(odd, told):
    code, report, _ = told("--data.captions.trigger=sks", "--export.trigger_words=sks", images=odd)
    assert code == 0
    assert table(report, "sources")[1] == [
        str(odd),
        "images",
        "training",
        "7",
        "0",
        "7",
        "1 to 3",
        "1",
        "9",
    ]
    assert fact(report, "total") == ["7"]
    assert fact(report, "smaller than their bucket")[1:] == ["small.png  32x40, x 2.00"]
    assert fact(report, "the same file more than once") == ["1 group", "a.png = again.png"]
    assert fact(report, "tokens")[0].endswith("reads at most 22")
    (count, line) = fact(report, "too long, cut by the encoder")
    assert count == "1"
    assert re.fullmatch(r"long\.png  \d+ tokens: sks face face .*\.\.\.", line)
    assert fact(report, "empty") == ["1", "nothing.png"]
    lacking = fact(report, "without 'sks'")
    assert lacking[0] == "3; the run puts it before them"
    assert lacking[1:] == ["again.png  another face", "b.png  a face", "nothing.png"]
    assert fact(report, "trained without 'sks'") == ["none"]


def test_captions_without_the_trigger_words_are_counted(odd, told):
    _, report, _ = told("--export.trigger_words=sks", images=odd)
    assert "without 'sks'" not in report.replace("trained without", "")
    assert fact(report, "trained without 'sks'")[0].startswith("3 (")
    assert len(fact(report, "trained without 'sks'")) == 4


def test_buckets_are_listed_with_their_crops_and_visits(odd, told):
    _, report, _ = told("--batch_size=4", images=odd)
    header, *rows = table(report, "buckets")
    assert header == ["width x height", "images", "held out", "visits per epoch", "micro-batches per epoch",
                      "cropped away", "at most"]  # fmt: skip
    by_size = {row[0]: row[1:] for row in rows if len(row) == len(header)}
    # 32 x 40 becomes 64 x 80 and is cropped to 64 x 64; 160 x 64 becomes 96 x 38, cropped to 96 x 32
    assert by_size["64 x 64"] == ["6", "0", "6", "1.5", f"{20 / 6:.1f}%", "20.0%"]
    assert by_size["96 x 32"] == ["1", "0", "3", "0.75", "15.8%", "15.8%"]
    assert "96 x 32 has 3 visits per epoch, and a micro-batch of 4 every 1.33 epochs" in report
    _, report, _ = told("--no_bucket_mode", images=odd)
    assert [row[0] for row in table(report, "buckets")[1:]] == ["64 x 64"]


def test_several_sources_of_a_recipe_are_listed(odd, tmp_path, told):
    image(tmp_path / "class" / "x.png")
    (tmp_path / "class" / "y.png").write_bytes((odd / "b.png").read_bytes())
    (tmp_path / "class" / "y.txt").write_text("a face")
    recipe = tmp_path / "recipe.yaml"
    options = {
        "path": str(odd),
        "validation_path": str(TWEMOJI / "validation"),
        "prior_loss_weight": 0.5,
        "captions": {"trigger": "sks", "shuffle": True, "dropout": 0.1},
        "sources": [{"path": str(tmp_path / "class"), "regularization": True, "repeats": 2}],
    }
    recipe.write_text(yaml.safe_dump({"data": options}))
    code, report, _ = told(recipe=[str(recipe)])
    assert code == 0
    rows = table(report, "sources")
    held_out = len(list((TWEMOJI / "validation").glob("*.png")))
    assert rows[2] == [
        str(tmp_path / "class"),
        "images",
        "regularization",
        "2",
        "0",
        "2",
        "2",
        "0.5",
        "4",
    ]
    assert rows[3][2:5] == ["validation", str(held_out), str(held_out)]
    assert rows[4] == ["all", str(9 + held_out), str(held_out), str(9 + held_out), "13"]
    assert fact(report, "the same file more than once")[1:] == [
        f"{odd}/a.png = {odd}/again.png", f"{odd}/b.png = {tmp_path}/class/y.png"
    ]  # fmt: skip
    assert f"{held_out} of {9 + held_out} images: those of {TWEMOJI / 'validation'}" in report
    assert len(fact(report, "without 'sks'")) == 4, (
        "neither regularization nor validation needs the trigger"
    )


def test_the_amount_to_encode_equals_the_encoded_amount(odd, told, tmp_path):
    options = [
        "--data.random_flip",
        "--data.vae_sampling=sample",
        "--data.masks=alpha",
        "--data.captions.dropout=0.2",
    ]
    _, before, _ = told(*options, images=odd)
    data = data_config(path=str(odd), cache_dir=str(tmp_path / "cache"), resolution=64, random_flip=True,
                      vae_sampling="sample", masks="alpha", caption_dropout=0.2)  # fmt: skip
    reset_accelerate()
    built = build_datasets(data, get_family(ModelConfig(path=str(BASE))), SINGLE_PROCESS)
    media, text = Store(built.train.media.folder), Store(built.train.text.folder)
    latents = [media.read_row(int(row_id)) for row_id in media.row_ids]
    texts = [text.read_row(int(row_id)) for row_id in text.row_ids]
    sizes = [sum(t.nbytes for row in rows for t in row.values()) for rows in (latents, texts)]
    made = {row[0]: row[1:] for row in table(before, "encoding") if len(row) == 5}
    assert made["latents, with mirrored ones"] == ["12", "0", "12", data_size(sizes[0])], (
        "two images are alike"
    )
    assert made["conditioning"] == [str(len(texts)), "0", str(len(texts)), data_size(sizes[1])]
    _, after, _ = told(*options, images=odd)
    stored = {row[0]: row[1:] for row in table(after, "encoding") if len(row) == 5}
    assert stored["latents, with mirrored ones"] == ["12", "12", "0", "0 bytes"]
    assert stored["conditioning"][2:] == ["0", "0 bytes"]


def data_size(count: int) -> str:
    from tools.data.report import format_bytes

    return format_bytes(count)


def test_all_errors_are_reported_at_once_as_in_a_run(odd, told, tmp_path):
    (odd / "zero.png").write_bytes(b"")
    (odd / "zero.txt").write_text("x")
    (odd / "lonely.txt").write_text("no image")
    code, out, err = told(images=odd)
    assert (code, out) == (2, "")
    assert "2 errors" in err
    assert "zero.png: the file is empty" in err
    assert "lonely.txt: a caption without an image" in err
    code, out, err = told("--data.on_error=skip", images=odd)
    assert code == 0
    assert out.startswith("2 errors in the training data, 7 samples without errors")
    assert fact(out, "total") == ["7, 1 skipped"]
    assert not list((tmp_path / "cache").glob(".stages-*")), "what the look left is gone"


def test_mistakes_in_the_options_end_with_2(odd, told, tmp_path):
    code, _, err = told("--decode", images=odd)
    assert (code, "--decode: has no effect without --sheets" in err) == (2, True)
    code, _, err = told(f"--sheets={odd / 'sheets'}", images=odd)
    assert (code, "the sheets would become training images" in err) == (2, True)
    (tmp_path / "file").write_text("")
    code, _, err = told(
        f"--sheets={tmp_path / 'file'}", f"--output_dir={tmp_path / 'file'}", images=tmp_path / "no"
    )
    assert code == 2
    assert "2 errors" in err
    assert "exists and is not a folder" in err
    assert f"--data.path {tmp_path / 'no'}: is not a folder" in err


def test_sheets_show_the_crops_with_captions(odd, told, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, out, _ = told(f"--sheets={tmp_path / 'sheets'}", images=odd)
    assert code == 0
    files = sorted((tmp_path / "sheets").iterdir())
    assert [f"wrote {file}" for file in files] == sorted(
        line for line in out.splitlines() if line.startswith("wrote")
    )
    assert [file.name for file in files] == ["bucket_64x64.png", "bucket_96x32.png"]
    sheet = np.asarray(Image.open(files[1]), np.float32)
    crop = Crop(160, 64, 96, 38, 0, 3, 96, 32)
    seen = (
        pixels((odd / "3_wide" / "wide.png").read_bytes(), crop, "white").permute(1, 2, 0).numpy()
        + 1
    ) * 127.5
    left = (sheet.shape[1] - 96) // 2
    tiles = [sheet[30:62, x : x + 96] for x in range(left - 40, left + 40)]
    assert min(np.abs(tile - seen).max() for tile in tiles if tile.shape == seen.shape) <= 0.5, (
        "as training sees it"
    )
    assert (sheet[64:] < 50).all(-1).any(), "and text"
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before.keys()
    assert all(path.is_relative_to(tmp_path / "cache") or path in files for path in written)
    assert all(path.read_bytes() == content for path, content in before.items())
    width = Image.open(files[0]).width
    monkeypatch.setattr(contact_sheets, "MAX_IMAGES", 2)
    assert told(f"--sheets={tmp_path / 'sheets'}", images=odd)[0] == 0
    assert Image.open(files[0]).width < width / 2, "two of six images, from both ends"


def test_sheets_of_latents_show_decoded_latents(told, images, tmp_path):
    words = [f"--sheets={tmp_path / 'sheets'}", "--decode"]
    code, out, _ = told(*words, images=images)
    assert code == 1
    assert (
        "bucket_64x64.png was not drawn, because nothing is encoded yet. To draw all, start the training "
        "with these options, which encodes first, or leave out --decode" in out
    )
    assert not (tmp_path / "sheets").exists()
    reset_accelerate()
    data = data_config(path=str(images), cache_dir=str(tmp_path / "cache"), resolution=64)
    build_datasets(data, get_family(ModelConfig(path=str(BASE))), SINGLE_PROCESS)
    assert told(*words, images=images)[0] == 0
    decoded = np.asarray(Image.open(tmp_path / "sheets" / "bucket_64x64.png"), np.float32)
    assert told(words[0], images=images)[0] == 0
    shown = np.asarray(Image.open(tmp_path / "sheets" / "bucket_64x64.png"), np.float32)
    top = min(len(decoded), len(shown))
    tiles = slice(30, 30 + 128)
    difference = np.abs(decoded[:top][tiles, :500] - shown[:top][tiles, :500]).mean()
    assert 0 < difference < 25, "a tiny VAE is near the images, and not the same"
    image(images / "new.png", caption="a new one")
    code, out, _ = told(*words, images=images)
    assert code == 1
    assert "bucket_64x64.png shows 4 of 5 images, those that are encoded" in out


def test_data_of_comfyui_needs_decode(told, tmp_path):
    folder = tmp_path / "comfy"
    folder.mkdir()
    items = [{"samples": torch.randn(1, 4, 32, 32)} for _ in range(2)]
    conds = [[[torch.randn(1, 24, 96), {"pooled_output": None}]]] * 2
    torch.save({"latents": items, "conditioning": conds}, folder / "shard_0000.pkl")
    (folder / "metadata.json").write_text(
        json.dumps({"num_samples": 2, "num_shards": 1, "shard_size": 1000})
    )
    code, out, _ = told(f"--sheets={tmp_path / 'sheets'}", images=folder)
    assert code == 1
    assert "none: data that was encoded elsewhere has no captions" in out
    assert re.search(
        r"bucket_\d+x\d+\.png was not drawn, because its samples are latents. Use --decode", out
    )
    code, out, _ = told(f"--sheets={tmp_path / 'sheets'}", "--decode", images=folder)
    assert code == 0
    assert len(list((tmp_path / "sheets").glob("bucket_*.png"))) == 1


def test_encoded_data_is_reported(told, images, tmp_path):
    data = data_config(path=str(images), cache_dir=str(tmp_path / "elsewhere"), resolution=64)
    reset_accelerate()
    with DatasetBuilder.opened(
        data, get_family(ModelConfig(path=str(BASE))), SINGLE_PROCESS
    ) as build:
        write_dataset(build, build.encode(build.plan(False)), tmp_path / "encoded", "encoded")
    code, out, _ = told(f"--sheets={tmp_path / 'sheets'}", "--decode", images=tmp_path / "encoded")
    assert code == 0
    assert table(out, "sources")[1][1:5] == ["encoded", "training", "4", "0"]
    assert "everything is stored in" in out
    assert fact(out, "total") == ["4"]
    assert (tmp_path / "sheets" / "bucket_64x64.png").is_file()


def test_sheets_of_a_streamed_dataset_are_drawn(told, tmp_path):
    pictures = []
    for i in range(5):
        image(tmp_path / "images" / f"{i}.png", (64, 64 + 64 * (i % 2)))
        pictures.append({"bytes": (tmp_path / "images" / f"{i}.png").read_bytes(), "path": None})
    columns = {"image": pictures, "text": ["one", "two", "three", "four", ""]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "set" / "0.parquet")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"data": {"sources": [{"path": str(tmp_path / "set"), "streaming": True}]}})
    )
    code, out, _ = told(f"--sheets={tmp_path / 'sheets'}", recipe=[str(recipe)])
    assert code == 0
    assert table(out, "sources")[1][1:4] == ["dataset", "training", "5"]
    assert fact(out, "empty") == ["1", "row 4"]
    assert len(list((tmp_path / "sheets").iterdir())) == 2


def test_long_lists_are_shortened(told, tmp_path):
    for i in range(counts.MAX_NAMES + 3):
        image(tmp_path / "many" / f"{i:02}.png", (20, 20), caption="")
    _, report, _ = told(images=tmp_path / "many")
    assert fact(report, "empty")[-1] == "... and 3 more"
    assert fact(report, "smaller than their bucket")[-1] == "... and 3 more"
    assert len(fact(report, "empty")) == counts.MAX_NAMES + 2


def test_tokens_are_counted_without_the_encoder(monkeypatch):
    family = get_family(ModelConfig(path=str(BASE)))
    encoders = family.load_encoders("text")
    captions = ["", "a face", LONG, "\U0001f600"]
    wanted = [len(encoders.tokenizer(text).input_ids) - 2 for text in captions]
    monkeypatch.setattr(type(family), "load_encoders", None)
    assert family.count_tokens(captions) == (wanted, encoders.tokenizer.model_max_length - 2)
    assert cond_bytes(family) == encoders.encode_prompt(["x"], "cpu", 1, False)[0].nbytes


def test_the_page_shows_commands_that_run(tmp_path, run_here, capsys, monkeypatch):
    section = PAGE.split("## Check your data before you train")[1].split("\n## ")[0]
    commands, shown = re.search(r"```bash\n(.*?)```\n\n```\n(.*?)```", section, re.S).groups()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(PROJECT / "recipes")
    for command in commands.splitlines():
        words = shlex.split(command)
        assert words[:3] == ["python", "train_lora.py", "data"]
        assert run_here(words[2:]) == 0
        there = [
            line
            for line in capsys.readouterr().out.replace(f"{PROJECT}/", "").splitlines()
            if "free" not in line
        ]
        here = [line for line in shown.splitlines() if "free" not in line]
        assert [line.split() for line in there] == [line.split() for line in here]
    assert (tmp_path / "output" / "sheets" / "bucket_64x64.png").is_file()


@pytest.mark.parametrize("command", [["data"], ["export-dataset", "--out=out"]], ids=lambda c: c[0])
def test_a_slider_without_images_has_no_data(command, capsys):
    slider = [f"--objective.slider.{name}s=a {name}" for name in ("target", "positive", "negative")]
    assert train_lora.main([*command, f"--model.path={BASE}", *slider]) == 2
    assert f"so `{command[0]}` has nothing to read" in capsys.readouterr().err
