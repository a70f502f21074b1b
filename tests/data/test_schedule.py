"""Which samples meet when, with which noise: a pure function of seed, data and position, whatever the hardware."""

import threading

import numpy as np
import pytest
import torch
from helpers.data_cases import dataset_of

from data.batches import Batch, MicroBatches, make_batch
from data.loader import load_micro_batches
from data.schedule import MAX_LISTED_SIZE, Permutation, Schedule, Segment, random_key


def schedule(rows=10, seed=0, batch_size=3, content_hash="f") -> Schedule:
    return Schedule(((Segment(0, rows),),), content_hash, seed, batch_size)


BUCKETS = ((Segment(0, 3), Segment(3, 2, 2)), (Segment(5, 1),), (Segment(6, 20), Segment(26, 1, 3)))


def rows_of(s: Schedule, numbers) -> list[int]:
    return [row for m in numbers for row in s.rows(m)]


def test_every_row_is_seen_as_often_as_it_repeats():
    """After so many epochs that every bucket has filled its last batch, exactly so."""
    s = Schedule(BUCKETS, "f", 0, 4)
    epochs = 4
    seen = np.bincount(rows_of(s, range(epochs * s.epoch_size // 4)))
    assert seen.tolist() == [epochs] * 3 + [2 * epochs] * 2 + [epochs] * 21 + [3 * epochs]


def test_in_every_epoch_each_row_of_a_bucket_comes_once_before_any_comes_again():
    s = schedule(rows=14, batch_size=7)
    for epoch in range(3):
        assert sorted(rows_of(s, range(2 * epoch, 2 * epoch + 2))) == list(range(14))


@pytest.mark.parametrize("batch_size", [1, 4, 7, 50])
def test_a_micro_batch_is_of_one_bucket_and_every_one_comes_once(batch_size):
    s = Schedule(BUCKETS, "f", 0, batch_size)
    of_row = [
        bucket for bucket, segments in enumerate(BUCKETS) for x in segments for _ in range(x.count)
    ]
    places = [s.bucket_batch(m) for m in range(300)]
    for m, (bucket, _) in enumerate(places):
        assert {of_row[row] for row in s.rows(m)} == {bucket}
    assert len(s.rows(0)) == batch_size
    for bucket in range(3):
        numbers = [number for b, number in places if b == bucket]
        # in the last epoch some are still to come; before that none is left out
        assert len(set(numbers)) == len(numbers)
        assert max(numbers, default=0) < len(numbers) + s.epoch_size // batch_size + 1


def test_a_bucket_smaller_than_a_batch_waits_until_it_is_filled():
    s = Schedule(((Segment(0, 1),), (Segment(1, 7),)), "f", 0, 4)
    rows = [s.rows(m) for m in range(8)]
    assert rows.count([0] * 4) == 1
    assert all(len(r) == 4 for r in rows)


def test_epochs_seeds_and_data_sets_shuffle_differently():
    orders = [rows_of(schedule(rows=50, batch_size=50), [epoch]) for epoch in (0, 1)]
    orders += [
        rows_of(schedule(rows=50, batch_size=50, **other), [0])
        for other in ({"seed": 1}, {"content_hash": "g"})
    ]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("exact", [True, False])
def test_positions_are_uniform(exact, monkeypatch):
    """Chi-square of where a position goes, over seeds; for both kinds of permutations."""
    if not exact:
        monkeypatch.setattr("data.schedule.MAX_LISTED_SIZE", 1)
    count, tries = 20, 2000
    for position in (0, 7):
        to = np.bincount(
            [Permutation(count, seed)[position] for seed in range(tries)], minlength=count
        )
        chi_square = ((to - tries / count) ** 2 / (tries / count)).sum()
        assert chi_square < 43.8  # 19 degrees of freedom: exceeded once in a thousand times


@pytest.mark.parametrize("count", [1, 2, 17, 1000, MAX_LISTED_SIZE, MAX_LISTED_SIZE + 1, 100_003])
def test_permutations_are_permutations(count):
    p = Permutation(count, 3)
    assert sorted(p[i] for i in range(count)) == list(range(count))


def test_neighbors_of_a_long_permutation_go_independent_ways():
    count, draws = 10**8, 20_000
    p = Permutation(count, 3)
    table = np.zeros((10, 10))
    for i in range(draws):
        table[p[2 * i] * 10 // count, p[2 * i + 1] * 10 // count] += 1
    chi_square = ((table - draws / 100) ** 2 / (draws / 100)).sum()
    assert chi_square < 149  # 99 degrees of freedom, 0.1 %


def test_a_hundred_million_rows_take_no_list(monkeypatch):
    import tracemalloc

    s = Schedule(
        ((Segment(0, 10**8),), (Segment(10**8, 3 * 10**7, 2), Segment(10**9, 5))), "f", 0, 4
    )
    tracemalloc.start()
    rows = rows_of(s, [0, 10**6, 10**9, 10**12])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(rows)) == 16
    assert peak < 100_000


def test_the_order_does_not_depend_on_how_it_is_asked_for():
    s = Schedule(BUCKETS, "f", 0, 3)
    straight = rows_of(s, range(20))
    jumping = {m: rows_of(Schedule(BUCKETS, "f", 0, 3), [m]) for m in (19, 3, 0, 7, 12, *range(20))}
    assert [row for m in range(20) for row in jumping[m]] == straight


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_ranks_and_accumulation_share_the_same_steps(ranks, accumulation):
    s = Schedule(BUCKETS, "f", 0, 3)
    per_step = ranks * accumulation
    for step in range(5):
        numbers = [
            m
            for r in range(ranks)
            for m in range(step * per_step + r, (step + 1) * per_step, ranks)
        ]
        assert sorted(rows_of(s, numbers)) == sorted(rows_of(s, range(step * 4, step * 4 + 4)))


def test_keys_are_stable_and_keep_their_parts_apart():
    assert random_key("sample", 0, 1) == 189391374906045227
    assert (
        len(
            {
                random_key("a", 1, 2),
                random_key("a", 2, 1),
                random_key("b", 1, 2),
                random_key("a", 1),
                random_key("a", 12),
                random_key("a", "1", 2),
            }
        )
        == 6
    )


@pytest.fixture
def dataset(tmp_path):
    return dataset_of(tmp_path, 5)


def test_noise_belongs_to_the_visit_not_to_the_batch(dataset):
    small = MicroBatches(dataset, Schedule(dataset.buckets, "f", 0, 1))
    large = MicroBatches(dataset, Schedule(dataset.buckets, "f", 0, 4))[1]
    for i in range(4):
        single = small[4 + i]
        assert single.noise[0].equal(large.noise[i])
        assert single.quantile[0] == large.quantile[i]
    rows = Schedule(dataset.buckets, "f", 0, 4).rows(1)
    assert large.latents[:, 0, 0, 0].tolist() == [
        float(dataset.samples["listed"][row]) for row in rows
    ]
    other_seed = MicroBatches(dataset, Schedule(dataset.buckets, "f", 1, 4))[1]
    assert not other_seed.noise.equal(large.noise)


def test_noise_is_standard_normal_and_quantiles_uniform(dataset):
    batch = make_batch(
        dataset, [0] * 4000, [random_key("sample", 0, v) for v in range(4000)], range(4000)
    )
    assert abs(batch.noise.mean()) < 0.02
    assert abs(batch.noise.std() - 1) < 0.02
    counts = torch.histc(batch.quantile, 10, 0, 1)
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-square, 9 degrees of freedom, 0.1 %
    correlation = torch.corrcoef(torch.stack([batch.quantile, batch.noise[:, 0, 0, 0]]))[0, 1]
    assert abs(correlation) < 0.06


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_gives_the_numbers_asked_for_in_order(dataset, num_workers):
    s = Schedule(dataset.buckets, "f", 0, 2)
    batches = list(
        load_micro_batches(MicroBatches(dataset, s), range(3, 11, 2), num_workers, pin_memory=False)
    )
    assert [batch.visits for batch in batches] == [
        range(6, 8),
        range(10, 12),
        range(14, 16),
        range(18, 20),
    ]
    for batch, number in zip(batches, range(3, 11, 2), strict=True):
        assert batch.noise.equal(MicroBatches(dataset, s)[number].noise)


def test_threads_pin_memory_on_the_gpu_of_their_process(dataset, monkeypatch):
    chosen, pinned = [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append((threading.get_ident(), device))
    )
    monkeypatch.setattr(
        Batch, "pin_memory", lambda self: pinned.append(threading.get_ident()) or self
    )
    assert (
        len(
            list(
                load_micro_batches(
                    MicroBatches(dataset, Schedule(dataset.buckets, "f", 0, 2)),
                    range(4),
                    1,
                    pin_memory=True,
                )
            )
        )
        == 4
    )
    assert chosen == [(pinned[0], 3)]
    assert len(set(pinned)) == 1
    assert pinned[0] != threading.get_ident()
