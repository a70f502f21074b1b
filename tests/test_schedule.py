"""Which samples meet when, with which noise: a pure function of seed, data and position, whatever the hardware."""

import numpy as np
import pytest
import torch

from data.batches import LatentDataset, MicroBatches, make_batch, micro_batches
from data.schedule import Schedule, key
from data.sources import SourceImage
from data.store import Store


def schedule(rows=10, seed=0, batch_size=3, fingerprint="f", repeats=1) -> Schedule:
    return Schedule(np.repeat(np.arange(rows), repeats), fingerprint, seed, batch_size)


def rows_of(s: Schedule, micro_batch_numbers) -> list[int]:
    return [s.row(visit) for m in micro_batch_numbers for visit in s.visits(m)]


def test_every_epoch_shows_each_row_as_often_as_it_repeats():
    s = Schedule(np.repeat(np.arange(7), [1, 2, 3, 1, 1, 5, 1]), "f", 0, 4)
    for epoch in range(3):
        seen = [s.row(visit) for visit in range(14 * epoch, 14 * (epoch + 1))]
        assert np.bincount(seen).tolist() == [1, 2, 3, 1, 1, 5, 1]


def test_epochs_seeds_and_data_sets_shuffle_differently():
    orders = [rows_of(schedule(rows=50, batch_size=50), [epoch]) for epoch in (0, 1)]
    orders += [rows_of(schedule(rows=50, batch_size=50, **other), [0]) for other in ({"seed": 1}, {"fingerprint": "g"})]
    assert len({tuple(order) for order in orders}) == 4


def test_positions_are_uniform():
    count, epochs = 20, 2000
    s = schedule(rows=count, batch_size=count)
    first = np.bincount([s.row(epoch * count) for epoch in range(epochs)], minlength=count)
    chi_square = ((first - epochs / count) ** 2 / (epochs / count)).sum()
    assert chi_square < 43.8  # 19 degrees of freedom: exceeded once in a thousand seeds


def test_the_order_does_not_depend_on_how_it_is_asked_for():
    straight = rows_of(schedule(), range(20))
    s = schedule()
    jumping = {m: rows_of(s, [m]) for m in (19, 3, 0, 7, 12, *range(20))}
    assert [row for m in range(20) for row in jumping[m]] == straight


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_ranks_and_accumulation_share_the_same_steps(ranks, accumulation):
    s = schedule()
    per_step = ranks * accumulation
    for step in range(5):
        numbers = [m for r in range(ranks) for m in range(step * per_step + r, (step + 1) * per_step, ranks)]
        assert sorted(rows_of(s, numbers)) == sorted(rows_of(s, range(step * 4, step * 4 + 4)))


def test_keys_are_stable_and_keep_their_parts_apart():
    assert key("sample", 0, 1) == 189391374906045227
    assert len({key("a", 1, 2), key("a", 2, 1), key("b", 1, 2), key("a", 1), key("a", 12), key("a", "1", 2)}) == 6


@pytest.fixture
def dataset(tmp_path) -> LatentDataset:
    images = [SourceImage(f"{i}", f"caption {i % 2}", 1, bytes) for i in range(5)]
    media, text = Store(tmp_path / "media"), Store(tmp_path / "text")
    keys = {image: f"k{image.name}" for image in images}
    media.write((keys[image], {"latents": torch.full((4, 2, 2), float(image.name))}) for image in images)
    result = LatentDataset(images, keys, media, text)
    text.write(
        (text_key, {"prompt_embeds": torch.full((3, 5), i)})
        for i, text_key in enumerate({t: 0 for _, t in result.keys})
    )
    media.reload()
    text.reload()
    return result


def test_noise_belongs_to_the_visit_not_to_the_batch(dataset):
    small = MicroBatches(dataset, Schedule(dataset.epoch_rows, "f", 0, 1))
    large = MicroBatches(dataset, Schedule(dataset.epoch_rows, "f", 0, 4))[1]
    for i in range(4):
        single = small[4 + i]
        assert single.noise[0].equal(large.noise[i])
        assert single.quantile[0] == large.quantile[i]
        assert single.latents[0].equal(large.latents[i])
        assert single.cond["prompt_embeds"][0].equal(large.cond["prompt_embeds"][i])
    other_seed = MicroBatches(dataset, Schedule(dataset.epoch_rows, "f", 1, 4))[1]
    assert not other_seed.noise.equal(large.noise)


def test_noise_is_standard_normal_and_quantiles_uniform(dataset):
    batch = make_batch(dataset, [0] * 4000, [key("sample", 0, v) for v in range(4000)], range(4000))
    assert abs(batch.noise.mean()) < 0.02
    assert abs(batch.noise.std() - 1) < 0.02
    counts = torch.histc(batch.quantile, 10, 0, 1)
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-square, 9 degrees of freedom, 0.1 %
    correlation = torch.corrcoef(torch.stack([batch.quantile, batch.noise[:, 0, 0, 0]]))[0, 1]
    assert abs(correlation) < 0.06


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_gives_the_numbers_asked_for_in_order(dataset, num_workers):
    s = Schedule(dataset.epoch_rows, "f", 0, 2)
    batches = list(micro_batches(dataset, s, range(3, 11, 2), num_workers, pin_memory=False))
    assert [batch.visits for batch in batches] == [range(6, 8), range(10, 12), range(14, 16), range(18, 20)]
    for batch, number in zip(batches, range(3, 11, 2), strict=True):
        assert batch.noise.equal(MicroBatches(dataset, s)[number].noise)
