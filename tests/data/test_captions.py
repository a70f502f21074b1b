"""What an image is shown with: trigger, shuffled and dropped tags, and the variants that are encoded."""

from collections import Counter

import pytest
from helpers.data_cases import data_config, dataset_of, sample_of, source_config

from data.batches import make_batch
from data.config import SourceConfig
from data.media.captions import caption_variants, variants_of_one
from data.schedule import random_key
from data.store.keys import key_of


def source(**options) -> SourceConfig:
    return data_config(**options).with_defaults(source_config("x"))


def test_a_caption_is_left_alone():
    assert variants_of_one("b,  a photo. Of b", source()) == {"b,  a photo. Of b": 1.0}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [("a dog", "sks, a dog"), ("a sks dog", "a sks dog"), ("", "sks"), ("risks", "sks, risks")],
)
def test_the_trigger_comes_first_unless_it_is_there(caption, expected):
    assert variants_of_one(caption, source(caption_trigger="sks")) == {expected: 1.0}


def test_regularization_images_have_no_trigger():
    config = data_config(caption_trigger="sks").with_defaults(
        source_config("x", regularization=True)
    )
    assert variants_of_one("a dog", config) == {"a dog": 1.0}


def test_all_orders_are_known_if_there_are_few():
    options = {"caption_shuffle": True, "caption_max_variants": 6}
    found = variants_of_one("k, a, b, c", source(caption_keep_tokens=1, **options))
    orders = ("a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a")
    assert found == {f"k, {order}": pytest.approx(1 / 6) for order in orders}
    assert len(variants_of_one("k, a, b, c", source(**options))) <= 6


def test_dropped_tags_come_as_often_as_they_should():
    dropout = {"caption_tag_dropout": 0.25}
    found = variants_of_one(
        "k, a, b", source(caption_keep_tokens=1, caption_max_variants=4, **dropout)
    )
    assert found == pytest.approx({"k, a, b": 0.5625, "k, a": 0.1875, "k, b": 0.1875, "k": 0.0625})
    both = variants_of_one("a, b", source(caption_shuffle=True, **dropout))
    assert both == pytest.approx(
        {"a, b": 0.28125, "b, a": 0.28125, "a": 0.1875, "b": 0.1875, "": 0.0625}
    )


def test_of_many_variants_a_fixed_number_is_drawn():
    tags = ", ".join(f"t{i}" for i in range(12))
    options = source(caption_shuffle=True, caption_tag_dropout=0.5, caption_max_variants=200)
    found = variants_of_one(tags, options)
    assert found == variants_of_one(tags, options)
    assert found != variants_of_one(f"{tags}, t12", options)
    assert sum(found.values()) == pytest.approx(1)
    drawn = Counter(
        tag
        for text, share in found.items()
        for tag in text.split(", ")
        for _ in range(round(share * 200))
    )
    assert all(70 < drawn[f"t{i}"] < 130 for i in range(12))


def test_the_trigger_is_neither_shuffled_nor_dropped():
    found = variants_of_one(
        "a, sks, b",
        source(caption_trigger="sks", caption_shuffle=True, caption_tag_dropout=0.9),
    )
    assert all(text.startswith("sks") for text in found)


def test_several_captions_share_the_visits():
    assert caption_variants(["a", "b", "b"], source()) == pytest.approx({"a": 1 / 3, "b": 2 / 3})


def test_visits_draw_variants_and_the_empty_prompt_as_often_as_they_should(tmp_path):
    texts = [key_of("a"), key_of("b"), key_of("c")]
    row = sample_of(
        0, caption_keys=texts, caption_probabilities=[0.5, 0.3, 0.2], caption_dropout=0.25
    )
    dataset = dataset_of(tmp_path, 1, [row])
    batch = make_batch(
        dataset, [0] * 4000, [random_key("sample", 0, v) for v in range(4000)], range(4000)
    )
    names = {
        float(dataset.text[text]["prompt_embeds"][0, 0]): name
        for text, name in zip(texts, "abc", strict=True)
    }
    counts = Counter(
        names.get(value, "empty") for value in batch.cond["prompt_embeds"][:, 0, 0].tolist()
    )
    expected = {"empty": 1000, "a": 1500, "b": 900, "c": 600}
    assert (
        sum((counts[name] - n) ** 2 / n for name, n in expected.items()) < 16.3
    )  # 3 degrees of freedom, 0.1 %
    fixed = make_batch(dataset, [0], [3], range(1), batch.quantile[:1])
    assert names[float(fixed.cond["prompt_embeds"][0, 0, 0])] == "a"


def test_visits_mirror_every_other_image(tmp_path):
    row = sample_of(0, media_keys=[key_of("plain"), key_of("mirrored")])
    dataset = dataset_of(tmp_path, 1, [row])
    batch = make_batch(
        dataset, [0] * 1000, [random_key("sample", 0, v) for v in range(1000)], range(1000)
    )
    assert 430 < (batch.latents[:, 0, 0, 0] == 0.5).sum() < 570
    again = make_batch(
        dataset, [0] * 1000, [random_key("sample", 0, v) for v in range(1000)], range(1000)
    )
    assert again.latents.equal(batch.latents)
