"""The encoded rows on disk, and the encoding that fills them."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import torch
from helpers.data_cases import SINGLE_PROCESS, data_config, source_config
from helpers.project import BASE
from PIL import Image

from common.atomic import WriteError
from common.errors import DataError
from common.hashing import file_hashes
from data.config import DataConfig
from data.precompute.build import build_datasets
from data.store.keys import key_of
from data.store.shard import data_path
from data.store.store import Store, damaged_shards
from models.config import ModelConfig
from models.detect import get_family


@pytest.fixture
def process():
    return SINGLE_PROCESS


@pytest.fixture
def family():
    return get_family(ModelConfig(path=str(BASE)))


def k(name: str) -> bytes:
    return key_of(name)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_tensors_come_back_exactly_in_their_dtype(tmp_path, dtype):
    tensor = torch.randn(4, 3, 2).mul(100).to(dtype)
    rows = [
        (k("a"), {"x": tensor, "y": torch.zeros(0, 5)}),
        (k("b"), {"x": tensor.mT, "y": torch.ones(1)}),
    ]
    Store(tmp_path).write(rows)
    store = Store(tmp_path)
    assert k("a") in store
    assert k("c") not in store
    assert store[k("a")]["x"].dtype == dtype
    assert store[k("a")]["x"].equal(tensor)
    assert store[k("b")]["x"].equal(tensor.mT)
    assert store[k("a")]["y"].shape == (0, 5)
    with pytest.raises(KeyError):
        store[k("c")]


def test_batches_are_stacked_from_any_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("data.store.store.ROWS_PER_SHARD", 3)
    Store(tmp_path).write((k(str(i)), {"x": torch.full((2, 3), i)}) for i in range(10))
    store = Store(tmp_path)
    assert len(store.shards) == 4
    row_ids = store.find(np.array([k(str(i)) for i in (7, 0, 3, 7, 9)], "S16")).tolist()
    assert store.read_batch(row_ids)["x"][:, 1, 2].tolist() == [7, 0, 3, 7, 9]
    Store(tmp_path).write([(k("odd"), {"x": torch.zeros(3, 2)})])
    store.reload()
    row_ids = store.find(np.array([k("1"), k("odd")], "S16")).tolist()
    with pytest.raises(
        DataError, match=r"x of one batch differ: \(2, 3\) torch.int64 and \(3, 2\) torch.float32"
    ):
        store.read_batch(row_ids)


@pytest.mark.parametrize("positioned", [True, False])
def test_threads_read_from_one_file_at_a_time_or_together(tmp_path, monkeypatch, positioned):
    """Windows has no reads at a position: the file is moved there, by one thread after another."""
    monkeypatch.setattr("data.store.shard.HAS_POSITIONED_READS", positioned)
    Store(tmp_path).write((k(str(i)), {"x": torch.full((1000,), i)}) for i in range(50))
    store = Store(tmp_path)
    row_ids = store.find(np.array([k(str(i)) for i in range(50)], "S16")).tolist()
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda row_id: store.read_tensor(row_id, "x"), row_ids * 4))
    assert all((row == i % 50).all() for i, row in enumerate(rows))


def test_the_store_is_a_datasets_dataset(tmp_path):
    Store(tmp_path).write((k(str(i)), {"x": torch.arange(4.0).bfloat16()}) for i in range(3))
    (shard,) = Store(tmp_path).shards
    rows = datasets.load_from_disk(str(shard))
    assert rows.features["x.data"].dtype == "large_binary"
    assert rows[1]["x.dtype"] == "bfloat16"
    assert torch.frombuffer(bytearray(rows[1]["x.data"]), dtype=torch.bfloat16).tolist() == [
        0,
        1,
        2,
        3,
    ]


def test_a_part_that_was_being_written_is_not_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("data.store.store.ROWS_PER_SHARD", 2)

    def rows():
        for i in range(4):
            yield k(str(i)), {"x": torch.tensor(i)}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).write(rows())
    (tmp_path / ".shard-broken").mkdir()
    assert sorted(Store(tmp_path).keys.tolist()) == sorted(k(str(i)) for i in range(4))


def test_a_full_disk_leaves_no_part_of_a_shard(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise WriteError(args[0], OSError("No space left on device"))

    monkeypatch.setattr("data.store.store.write_file", full)
    with pytest.raises(DataError, match="could not be written: No space left"):
        Store(tmp_path / "store").write([(k("a"), {"x": torch.zeros(2)})])
    assert not list((tmp_path / "store").iterdir())


def test_a_damaged_part_is_found_and_a_copied_one_is_not_taken_for_damaged(tmp_path):
    store = Store(tmp_path / "a")
    store.write([(k("x"), {"x": torch.arange(1000)})])
    assert damaged_shards(store.folder) == []
    shutil.copytree(
        tmp_path / "a", tmp_path / "b", copy_function=shutil.copy
    )  # with times of its own
    (shard,) = (tmp_path / "b").iterdir()
    before = json.loads((shard / "check.json").read_text())
    os.utime(data_path(shard), ns=(1, 1))
    assert damaged_shards(tmp_path / "b") == []
    assert json.loads((shard / "check.json").read_text()) == {**before, "mtime_ns": 1}, (
        "not to be read each time"
    )
    content = bytearray(data_path(shard).read_bytes())
    content[len(content) // 2] ^= 1
    data_path(shard).write_bytes(content)
    assert damaged_shards(tmp_path / "b") == [shard]
    (shard / "check.json").unlink()
    assert damaged_shards(tmp_path / "b") == [shard]


def config_for(images, tmp_path, **options) -> DataConfig:
    given = {"resolution": 64, "cache_dir": str(tmp_path / "cache"), **options}
    return data_config(path=None if images is None else str(images), **given)


def names_of(dataset) -> list[str]:
    return [dataset.name(row) for row in range(len(dataset))]


def test_rows_hold_what_the_encoders_give_raw(images, tmp_path, family, process):
    built = build_datasets(config_for(images, tmp_path), family, process)
    assert (built.encoded_images, built.encoded_captions) == (4, 4)
    encoders = family.load_encoders("text")
    row = names_of(built.train).index("owl.png")
    cond = family.encode_prompt(encoders, [(images / "owl.txt").read_text().strip()])[0]
    torch.testing.assert_close(
        built.train.cond(row)["prompt_embeds"], cond["prompt_embeds"], rtol=1e-5, atol=1e-5
    )
    latents = built.train.latents(row)
    assert (latents.shape, latents.dtype) == ((4, 16, 16), torch.float32)
    assert 2 < latents.std() < 12, "raw: 1 / 0.18215 times the scale of the loop"


def test_only_what_changed_is_encoded_again(images, tmp_path, family, process):
    def encoded(**options) -> tuple[int, int]:
        built = build_datasets(config_for(images, tmp_path, **options), family, process)
        return built.encoded_images, built.encoded_captions

    assert encoded() == (4, 4)
    assert encoded() == (0, 0)
    (images / "cat.txt").write_text("another caption")
    assert encoded() == (0, 1)
    shutil.copy(images / "cat.png", images / "again.png")
    shutil.copy(images / "cat.txt", images / "again.txt")
    assert encoded() == (0, 0), "the same content under another name"
    assert encoded(resolution=32) == (4, 0)
    assert encoded(random_flip=True) == (4, 0), "the mirrored ones"
    assert encoded() == (0, 0)
    other = get_family(ModelConfig(path=str(other_vae(tmp_path))))
    built = build_datasets(config_for(images, tmp_path), other, process)
    assert (built.encoded_images, built.encoded_captions) == (4, 0), (
        "another VAE, the same text encoder"
    )


def other_vae(tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(BASE, folder)
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text() + "\n")
    return folder


def test_a_damaged_part_is_named_and_encoded_again(images, tmp_path, family, process, capsys):
    first = build_datasets(config_for(images, tmp_path), family, process)
    expected = [first.train.latents(row) for row in range(4)]
    (shard,) = first.train.media.shards
    content = bytearray(data_path(shard).read_bytes())
    content[-500] ^= 1
    data_path(shard).write_bytes(content)
    again = build_datasets(config_for(images, tmp_path), family, process)
    assert f"{shard} is damaged: its rows are encoded again" in capsys.readouterr().out
    assert again.encoded_images == 4
    assert all(again.train.latents(row).equal(latents) for row, latents in enumerate(expected))


def test_rows_do_not_depend_on_what_else_is_encoded(images, tmp_path, family, process):
    """With full batches of one size, whichever rows happen to share them."""
    options = {"encode_batch_size": 3}
    whole = build_datasets(config_for(images, tmp_path, **options), family, process).train
    expected = {
        whole.name(row): (whole.latents(row), whole.cond(row)["prompt_embeds"]) for row in range(4)
    }
    shutil.rmtree(tmp_path / "cache")
    for kept in (("cat", "owl"), ("cat", "dog", "owl", "tiger")):
        part = tmp_path / f"part{len(kept)}"
        part.mkdir()
        for name in kept:
            for suffix in (".png", ".txt"):
                shutil.copy(images / f"{name}{suffix}", part)
        built = build_datasets(config_for(part, tmp_path, **options), family, process).train
        for row in range(len(built)):
            latents, embeds = expected[built.name(row)]
            assert built.latents(row).equal(latents)
            assert built.cond(row)["prompt_embeds"].equal(embeds)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 8),
        ({"encode_pixels": 3 * 64 * 64}, 3),
        ({"encode_pixels": 3 * 64 * 64, "encode_batch_size": 2}, 2),
        ({"encode_pixels": 64 * 64 - 1}, 1),
    ],
)
def test_images_are_encoded_by_a_pixel_budget(options, size, images, family, process, monkeypatch):
    """8 images of 1024x1024 would take 22 GB in an fp32 VAE, and one 2.7 GB."""
    encode_media = family.encode_media
    sizes = []

    def record_size(encoders, pixels):
        sizes.append(len(pixels))
        return encode_media(encoders, pixels)

    monkeypatch.setattr(family, "encode_media", record_size)
    build_datasets(config_for(images, images.parent, **options), family, process)
    assert sizes
    assert set(sizes) == {size}


def test_the_default_budget_is_one_image_of_a_megapixel():
    assert DataConfig().encode_pixels == 1024 * 1024


def test_the_content_hash_follows_content_and_repeats_not_names(images, tmp_path, family, process):
    def content_hash(**options) -> str:
        return build_datasets(
            config_for(images, tmp_path, **options), family, process
        ).train.content_hash

    first = content_hash()
    for suffix in (".png", ".txt"):
        (images / f"cat{suffix}").rename(images / f"z_cat{suffix}")
    assert content_hash() == first
    renamed = build_datasets(config_for(images, tmp_path), family, process).train
    assert "z_cat.png" in names_of(renamed), (
        "an index that is there is not taken for one with other names"
    )
    folder = images / "3_more"
    folder.mkdir()
    others = [content_hash(caption_dropout=0.1), content_hash(random_flip=True)]
    for suffix in (".png", ".txt"):
        (images / f"z_cat{suffix}").rename(folder / f"z_cat{suffix}")
    others.append(content_hash())
    (images / "dog.txt").write_text("changed")
    others.append(content_hash())
    assert len({first, *others}) == 5


def test_held_out_images_are_chosen_by_content(images, tmp_path, family, process):
    built = build_datasets(config_for(images, tmp_path, validation_fraction=0.25), family, process)
    assert (len(built.train), len(built.validation)) == (3, 1)
    held_out = built.validation.captions(1)
    for file in list(images.iterdir()):
        file.rename(images / f"{len(file.stem)}{file.name}")
    again = build_datasets(config_for(images, tmp_path, validation_fraction=0.25), family, process)
    assert again.validation.captions(1) == held_out
    with pytest.raises(DataError, match="leaves none"):
        build_datasets(config_for(images, tmp_path, validation_fraction=0.9), family, process)


def test_the_same_name_in_both_sets_is_two_images(images, tmp_path, family, process):
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    shutil.copy(images / "dog.png", held_out / "cat.png")
    shutil.copy(images / "cat.txt", held_out / "cat.txt")
    built = build_datasets(
        config_for(images, tmp_path, validation_path=str(held_out)), family, process
    )
    cat = names_of(built.train).index("cat.png")
    assert not built.validation.latents(0).equal(built.train.latents(cat))


def test_images_of_all_shapes_go_into_buckets(images, tmp_path, family, process):
    for name, size in (("wide", (300, 100)), ("wider", (310, 100)), ("tall", (40, 90))):
        Image.effect_noise(size, 50).save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(name)
    built = build_datasets(config_for(images, tmp_path), family, process).train
    sizes = {built.name(row): built.size(row) for row in range(len(built))}
    assert sizes == {
        "cat.png": (64, 64), "dog.png": (64, 64), "owl.png": (64, 64), "tiger.png": (64, 64),
        "wide.png": (32, 96), "wider.png": (32, 96), "tall.png": (96, 32),
    }  # fmt: skip
    for row in range(len(built)):
        height, width = built.size(row)
        assert built.latents(row).shape == (4, height // 4, width // 4)
    assert sorted(sum(s.visits for s in bucket) for bucket in built.buckets) == [1, 2, 4]
    square = build_datasets(config_for(images, tmp_path), family, process, only_square=True).train
    assert len(square.buckets) == 1


def test_several_sources_with_weights_repeats_and_captions_of_their_own(
    images, tmp_path, family, process
):
    regular = tmp_path / "regular"
    regular.mkdir()
    shutil.copy(images / "dog.png", regular / "any.png")
    sources = (
        source_config(str(images), repeats=2, weight=0.5, caption_trigger="sks"),
        source_config(str(regular), regularization=True, caption_text="a dog"),
    )
    config = config_for(
        None,
        tmp_path,
        sources=sources,
        prior_loss_weight=0.25,
        caption_dropout=0.3,
        validation_fraction=0.25,
    )
    built = build_datasets(config, family, process)
    rows = {built.train.name(row): row for row in range(len(built.train))}
    assert len(built.validation) == 1
    assert "any.png" in rows, "regularization images are never held out"
    weights = built.train.samples["weight"]
    assert [float(weights[row]) for name, row in sorted(rows.items())] == [0.25, 0.5, 0.5, 0.5]
    assert built.train.epoch_size == 3 * 2 + 1
    assert built.train.samples["caption_dropout"][rows["any.png"]] == 0
    assert built.encoded_captions == 4 + 1 + 1, "the captions, the class and the empty prompt"


def test_bad_images_can_be_skipped(images, tmp_path, family, process, capsys):
    (images / "dog.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 error\n  dog.png: "):
        build_datasets(config_for(images, tmp_path), family, process)
    built = build_datasets(config_for(images, tmp_path, on_error="skip"), family, process)
    assert (len(built.train), built.skipped) == (3, 1)
    assert (
        "1 error in the training data, 3 samples without errors\n  dog.png: "
        in capsys.readouterr().out
    )
    for file in images.glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="4 errors"):
        build_datasets(config_for(images, tmp_path, on_error="skip"), family, process)


def test_large_files_are_hashed_once(tmp_path):
    file = tmp_path / "big"
    file.write_bytes(b"x" * 2_000_000)
    first = file_hashes([file], tmp_path)
    memo = tmp_path / "file_hashes.json"
    memo.write_text(memo.read_text().replace(first[file], "remembered"))
    assert file_hashes([file], tmp_path)[file] == "remembered"
    file.write_bytes(b"y" * 2_000_001)
    assert file_hashes([file], tmp_path)[file] not in ("remembered", first[file])


def test_captions_that_are_cut_are_named(images, tmp_path, family, process, capsys):
    (images / "cat.txt").write_text("cat " * 50)
    build_datasets(config_for(images, tmp_path), family, process)
    assert (
        "1 caption is longer than the text encoder reads, and is cut off at the end\n  cat cat"
        in capsys.readouterr().out
    )
    build_datasets(config_for(images, tmp_path), family, process)
    assert "longer" not in capsys.readouterr().out
