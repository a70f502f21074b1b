"""The encoded rows on disk, and the encoding that fills them."""

import shutil

import pytest
import torch
from accelerate import Accelerator
from conftest import BASE, reset_accelerate

from data.config import DataConfig, DataError
from data.identity import file_hashes
from data.precompute import build_datasets
from data.store import Store
from models import get_family
from models.config import ModelConfig


@pytest.fixture
def accelerator():
    reset_accelerate()
    yield Accelerator(cpu=True)
    reset_accelerate()


@pytest.fixture
def family():
    return get_family(ModelConfig(path=str(BASE)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_tensors_come_back_exactly_in_their_dtype(tmp_path, dtype):
    tensor = torch.randn(4, 3, 2).mul(100).to(dtype)
    Store(tmp_path).write([("a", {"x": tensor, "y": torch.zeros(0, 5)}), ("b", {"x": tensor.mT, "y": torch.ones(1)})])
    store = Store(tmp_path)
    assert "a" in store
    assert "c" not in store
    assert store["a"]["x"].dtype == dtype
    assert store["a"]["x"].equal(tensor)
    assert store["b"]["x"].equal(tensor.mT)
    assert store["a"]["y"].shape == (0, 5)


def test_a_part_that_was_being_written_is_not_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("data.store.ROWS_PER_PART", 2)

    def rows():
        for i in range(4):
            yield str(i), {"x": torch.tensor(i)}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).write(rows())
    (tmp_path / ".part-broken").mkdir()
    store = Store(tmp_path)
    assert sorted(store.index) == ["0", "1", "2", "3"]


def config_for(images, tmp_path, **options) -> DataConfig:
    return DataConfig(images=str(images), resolution=64, cache_dir=str(tmp_path / "cache"), **options)


def test_rows_hold_what_the_encoders_give_raw(images, tmp_path, family, accelerator):
    built = build_datasets(config_for(images, tmp_path), family, accelerator)
    assert (built.encoded_images, built.encoded_captions) == (4, 4)
    encoders = family.load_encoders()
    row = built.train.names.index("owl.png")
    cond = family.encode_prompt(encoders, [built.train.captions[row]])[0]
    assert built.train.cond(row)["prompt_embeds"].equal(cond["prompt_embeds"])
    latents = built.train.latents(row)
    assert (latents.shape, latents.dtype) == ((4, 16, 16), torch.float32)
    assert 2 < latents.std() < 12, "raw: 1 / 0.18215 times the scale of the loop"


def test_only_what_changed_is_encoded_again(images, tmp_path, family, accelerator):
    def encoded(**options) -> tuple[int, int]:
        built = build_datasets(config_for(images, tmp_path, **options), family, accelerator)
        return built.encoded_images, built.encoded_captions

    assert encoded() == (4, 4)
    assert encoded() == (0, 0)
    (images / "cat.txt").write_text("another caption")
    assert encoded() == (0, 1)
    shutil.copy(images / "cat.png", images / "again.png")
    shutil.copy(images / "cat.txt", images / "again.txt")
    assert encoded() == (0, 0), "the same content under another name"
    other = get_family(ModelConfig(path=str(other_vae(tmp_path))))
    built = build_datasets(config_for(images, tmp_path), other, accelerator)
    assert (built.encoded_images, built.encoded_captions) == (4, 0), "another VAE, the same text encoder"


def other_vae(tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(BASE, folder)
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text() + "\n")
    return folder


def test_the_fingerprint_follows_content_and_repeats_not_names(images, tmp_path, family, accelerator):
    def fingerprint() -> str:
        return build_datasets(config_for(images, tmp_path), family, accelerator).train.fingerprint

    first = fingerprint()
    for suffix in (".png", ".txt"):
        (images / f"cat{suffix}").rename(images / f"a_cat{suffix}")
    assert fingerprint() == first
    (images / "dog.txt").write_text("changed")
    assert fingerprint() != first


def test_held_out_images_are_chosen_by_content(images, tmp_path, family, accelerator):
    built = build_datasets(config_for(images, tmp_path, validation_share=0.25), family, accelerator)
    assert (len(built.train), len(built.validation)) == (3, 1)
    held_out = built.validation.captions
    for file in list(images.iterdir()):
        file.rename(images / f"{len(file.stem)}{file.name}")
    again = build_datasets(config_for(images, tmp_path, validation_share=0.25), family, accelerator)
    assert again.validation.captions == held_out
    with pytest.raises(DataError, match="leaves none"):
        build_datasets(config_for(images, tmp_path, validation_share=0.9), family, accelerator)


def test_the_same_name_in_both_sets_is_two_images(images, tmp_path, family, accelerator):
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    shutil.copy(images / "dog.png", held_out / "cat.png")
    shutil.copy(images / "cat.txt", held_out / "cat.txt")
    built = build_datasets(config_for(images, tmp_path, validation_images=str(held_out)), family, accelerator)
    assert not built.validation.latents(0).equal(built.train.latents(0))


def test_large_files_are_hashed_once(tmp_path):
    file = tmp_path / "big"
    file.write_bytes(b"x" * 2_000_000)
    first = file_hashes([file], tmp_path)
    memo = tmp_path / "file_hashes.json"
    memo.write_text(memo.read_text().replace(first[file], "remembered"))
    assert file_hashes([file], tmp_path)[file] == "remembered"
    file.write_bytes(b"y" * 2_000_001)
    assert file_hashes([file], tmp_path)[file] not in ("remembered", first[file])
