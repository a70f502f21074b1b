"""The schedule: the samples of each step, as a pure function of (seed, dataset, batch size).

There is no sampler state. Visit v (v = 0, 1, 2, ...) is one sample seen once. Micro-batch m holds
the visits from m * batch_size to (m + 1) * batch_size - 1, all of one bucket. Step s on W processes
with accumulation A consumes micro-batches s*W*A ... (s+1)*W*A - 1. Process r takes those with
m mod W = r. So one process with A = 4, two with A = 2 and four with A = 1 train on the same samples
in the same step.

Each bucket is an endless row of epochs, cut into micro-batches of B. Every epoch is a new
permutation of the bucket's n samples. By the end of epoch e (counted from 1) floor(e n / B)
micro-batches are full. Those that become full in epoch e are trained on in epoch e, in an order
mixed over all buckets. So no micro-batch is ever smaller, and a bucket with fewer samples than B
waits until more visits fill it. After e epochs every sample was seen e times, or is about to be.
All of this is computed from m. Only permutations of up to 2^16 positions are ever listed.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from common.hashing import hash_number

MAX_LISTED_SIZE = 2**16
"""Up to this size a permutation is drawn from all permutations; above, it is computed position by
position."""
NUM_ROUNDS = 8
MASK_64 = 2**64 - 1


def random_key(purpose: str, *numbers: int | str) -> int:
    """Return a seed of 64 bits, which differs between purposes and between numbers."""
    return hash_number(purpose, *numbers)


class Permutation:
    """A permutation of range(size), a function of `seed`; long ones take no memory."""

    def __init__(self, size: int, seed: int):
        self.size = size
        if size <= MAX_LISTED_SIZE:
            # the order of the generator's raw bits, whose stream numpy guarantees, unlike that of
            # its `permutation`
            bits = np.random.Philox(key=seed).random_raw(size)
            order = np.argsort(bits, kind="stable")
            self.order = order.astype(np.uint16)
            return
        self.half_bits = (size.bit_length() + 1) // 2
        self.round_keys = [random_key("round", seed, number) for number in range(NUM_ROUNDS)]

    def __getitem__(self, position: int) -> int:
        """Return the number at a position."""
        if self.size <= MAX_LISTED_SIZE:
            return int(self.order[position])
        number = self._feistel(position)
        while number >= self.size:  # the bijection of a larger range, until it returns to this one
            number = self._feistel(number)
        return number

    def _feistel(self, number: int) -> int:
        """Apply a bijection of the numbers of 2 * half_bits bits (Luby and Rackoff 1988)."""
        half_mask = (1 << self.half_bits) - 1
        left = number >> self.half_bits
        right = number & half_mask
        for round_key in self.round_keys:
            mixed = mix_bits(right ^ round_key)
            new_right = left ^ (mixed & half_mask)
            left, right = right, new_right
        return left << self.half_bits | right


def mix_bits(value: int) -> int:
    """Mix 64 bits, as the finalizer of splitmix64 does after its first shift."""
    value = (value * 0xBF58476D1CE4E5B9) & MASK_64
    value ^= value >> 27
    value = (value * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)


@lru_cache(maxsize=128)
def permutation(size: int, seed: int) -> Permutation:
    return Permutation(size, seed)


@dataclass(frozen=True)
class Segment:
    """Dataset rows that follow each other and are seen equally often per epoch."""

    first: int
    count: int
    repeats: int = 1

    @property
    def visits(self) -> int:
        """Visits per epoch."""
        return self.count * self.repeats


class BucketBatch(NamedTuple):
    """A micro-batch as one of its bucket: index of the bucket, and number in the bucket."""

    bucket: int
    number: int


@dataclass(frozen=True)
class Schedule:
    """The order of training. `buckets`: the segments of each bucket."""

    buckets: tuple[tuple[Segment, ...], ...]
    content_hash: str
    seed: int
    batch_size: int

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Return the visits per epoch of each bucket."""
        sizes = []
        for bucket in self.buckets:
            num_visits = sum(segment.visits for segment in bucket)
            sizes.append(num_visits)
        return tuple(sizes)

    @property
    def epoch_size(self) -> int:
        """Visits per epoch."""
        return sum(self.sizes)

    def visits(self, micro_batch: int) -> range:
        """Return the visits of a micro-batch."""
        first = micro_batch * self.batch_size
        end = first + self.batch_size
        return range(first, end)

    def rows(self, micro_batch: int) -> list[int]:
        """Return the dataset rows of the visits of a micro-batch."""
        bucket, number = self.bucket_batch(micro_batch)
        bucket_visits = self.visits(number)
        return [self._row(bucket, visit) for visit in bucket_visits]

    def bucket_batch(self, micro_batch: int) -> BucketBatch:
        """Return the bucket of a micro-batch, and its number among those of the bucket.

        The micro-batches that become full in an epoch are trained on in a random order."""
        epoch = self.epoch_of(micro_batch)
        starts = self._num_full(epoch)
        ends = self._num_full(epoch + 1)
        counts = []
        for start, end in zip(starts, ends, strict=True):
            counts.append(end - start)
        key = random_key("batches", self.seed, self.content_hash, epoch)
        order = permutation(sum(counts), key)
        index = order[micro_batch - sum(starts)]
        # the micro-batches of the epoch, laid out bucket by bucket
        index_ends = list(accumulate(counts))
        bucket = bisect_right(index_ends, index)
        num_left = index_ends[bucket] - index
        return BucketBatch(bucket, ends[bucket] - num_left)

    def epoch_of(self, micro_batch: int) -> int:
        """Return the epoch, counted from 0, in which a micro-batch is trained on."""
        first_visit = micro_batch * self.batch_size
        earliest = first_visit // self.epoch_size
        # all buckets together fall short of n / B micro-batches per epoch by less than their number
        max_missing_visits = len(self.buckets) * self.batch_size
        max_missing_epochs = max_missing_visits // self.epoch_size + 1
        latest = earliest + max_missing_epochs
        epochs = range(earliest, latest + 1)
        num_started = bisect_right(epochs, micro_batch, key=self._first_micro_batch)
        return earliest + num_started - 1

    def _first_micro_batch(self, epoch: int) -> int:
        return sum(self._num_full(epoch))

    def _num_full(self, num_epochs: int) -> list[int]:
        """Return how many micro-batches of each bucket are full after so many epochs."""
        return [num_epochs * size // self.batch_size for size in self.sizes]

    def _row(self, bucket: int, visit: int) -> int:
        """Return the dataset row of a visit, counted within its bucket.

        Every epoch of a bucket has a new permutation of the visits of its samples."""
        size = self.sizes[bucket]
        epoch, position = divmod(visit, size)
        key = random_key("epoch", self.seed, self.content_hash, bucket, epoch)
        order = permutation(size, key)
        number = order[position]
        return nth_row(self.buckets[bucket], number)


def nth_row(segments: Sequence[Segment], number: int) -> int:
    """Return the row of a number, if the rows of all segments are laid out with their repeats."""
    for segment in segments:
        if number < segment.visits:
            return segment.first + number % segment.count
        number -= segment.visits
    raise AssertionError("a number beyond the bucket")
