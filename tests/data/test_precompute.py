"""Encoding before training: what is read and computed once, and what happens to damaged facts."""

import pytest
from helpers.data_cases import SINGLE_PROCESS, data_config
from helpers.project import BASE

import data.precompute.plan
from data.precompute.build import FACTS_VERSION, build_datasets
from data.precompute.facts import FactsCache, MediaFacts
from data.sources.folder import FolderSource
from data.store.keys import key_of
from models.config import ModelConfig
from models.detect import get_family


@pytest.fixture
def build(images, tmp_path):
    def run(**options):
        config = data_config(
            path=str(images), cache_dir=str(tmp_path / "cache"), resolution=64, **options
        )
        return build_datasets(config, get_family(ModelConfig(path=str(BASE))), SINGLE_PROCESS)

    return run


def test_an_image_is_read_once_per_stage(build, monkeypatch):
    names = []
    contents = FolderSource.contents

    def recorded(self, samples):
        for item in contents(self, samples):
            names.append(item.sample.name)
            yield item

    monkeypatch.setattr(FolderSource, "contents", recorded)
    built = build(random_flip=True)
    assert built.encoded_images == 8
    every = ["cat.png", "dog.png", "owl.png", "tiger.png"]
    assert names == every * 2, "to check it, and to encode it with its mirror image"
    names.clear()
    assert build(random_flip=True).encoded_images == 0
    assert names == []


def test_captions_are_made_once_per_image(build, monkeypatch):
    made = []
    variants = data.precompute.plan.caption_variants

    def recorded(captions, source):
        made.append(captions)
        return variants(captions, source)

    monkeypatch.setattr(data.precompute.plan, "caption_variants", recorded)
    built = build(caption_shuffle=True, caption_dropout=0.1)
    assert len(made) == 4
    assert built.encoded_captions == len({*built.train.caption_ids.tolist()}) + 1, (
        "and the empty prompt"
    )


def test_damaged_facts_are_found_and_the_images_checked_again(build, tmp_path, capsys):
    first = build()
    folder = tmp_path / "cache" / f"facts-{FACTS_VERSION}"
    (path,) = folder.iterdir()
    intact = path.read_bytes()
    damaged = bytearray(intact)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert len(FactsCache(folder).keys) == 0
    again = build()
    assert f"{path} is damaged: its images are checked again" in capsys.readouterr().out
    assert path.read_bytes() == intact
    assert again.train.content_hash == first.train.content_hash
    assert again.encoded_images == 0


def test_facts_come_back_by_key(tmp_path, monkeypatch):
    monkeypatch.setattr("data.precompute.facts.FACTS_PER_FILE", 3)
    facts = [
        MediaFacts(key_of(str(i)), key_of(f"c{i}"), key_of(""), i, 2 * i, i / 7 if i % 2 else None)
        for i in range(10)
    ]
    cache = FactsCache(tmp_path / "facts")
    with cache.writer() as writer:
        for item in facts:
            writer.add(item)
    assert key_of("0") not in cache
    cache.reload()
    assert len(list((tmp_path / "facts").iterdir())) == 4
    assert [cache[item.key] for item in facts] == facts
    assert key_of("x") not in cache
    with pytest.raises(KeyError):
        cache[key_of("x")]
