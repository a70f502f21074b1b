"""Which samples meet in which step, as a pure function of (seed, dataset, batch size): there is no
sampler state.

Visit v (v = 0, 1, 2, ...) is one sample seen once; micro-batch m holds the visits from m *
batch_size to (m + 1) * batch_size - 1, all of one bucket. Step s on W ranks with accumulation A
consumes micro-batches s*W*A ... (s+1)*W*A - 1, of which rank r takes those with m mod W = r. So one
rank with A = 4, two with A = 2 and four with A = 1 train on the same samples in the same step.

Each bucket is an endless row of epochs, every one a new permutation of its n samples, cut into
micro-batches of B. By the end of epoch e (counted from 1) floor(e n / B) of them are full; those
that become full in epoch e are trained on in epoch e, in an order mixed over all buckets. So none
is ever smaller, a bucket with fewer samples than B waits until more visits fill it, and after e
epochs every sample was or is about to be seen e times. All of this is computed from m; nothing is
listed but permutations of up to 2^16 positions.
"""

import hashlib
import struct
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np

EXACT = 2**16
"""Up to here a permutation is drawn from all there are; beyond, computed position by position."""
ROUNDS = 8
MASK = 2**64 - 1


def key(purpose: str, *numbers: int | str) -> int:
    """A 64-bit key that differs for every purpose and numbers: the seed of whatever is random
    there."""
    data = b"".join(
        struct.pack("<Q", n) if isinstance(n, int) else n.encode() + b"\0"
        for n in (purpose, *numbers)
    )
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Permutation:
    """A permutation of range(size), a function of `seed`; long ones take no memory."""

    def __init__(self, size: int, seed: int):
        self.size = size
        if size <= EXACT:
            # sorting the generator's raw bits, whose stream numpy guarantees; it does not guarantee
            # `permutation`
            bits = np.random.Philox(key=seed).random_raw(size)
            self.order = np.argsort(bits, kind="stable").astype(np.uint16)
            return
        self.half = (size.bit_length() + 1) // 2
        self.round_keys = [key("round", seed, i) for i in range(ROUNDS)]

    def __getitem__(self, position: int) -> int:
        if self.size <= EXACT:
            return int(self.order[position])
        place = self._feistel(position)
        while (
            place >= self.size
        ):  # outside: a bijection of 2^(2 half) places, followed until it comes back
            place = self._feistel(place)
        return place

    def _feistel(self, place: int) -> int:
        """A bijection of the numbers of 2 * half bits (Luby and Rackoff 1988)."""
        low = (1 << self.half) - 1
        left, right = place >> self.half, place & low
        for round_key in self.round_keys:
            mixed = ((right ^ round_key) * 0xBF58476D1CE4E5B9) & MASK  # the finaliser of splitmix64
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & low)
        return left << self.half | right


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
        """Per epoch."""
        return self.count * self.repeats


@dataclass(frozen=True)
class Schedule:
    """`buckets`: the segments of each bucket."""

    buckets: tuple[tuple[Segment, ...], ...]
    fingerprint: str
    seed: int
    batch_size: int

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Visits per epoch of each bucket."""
        return tuple(sum(segment.visits for segment in bucket) for bucket in self.buckets)

    @property
    def epoch_size(self) -> int:
        """Visits per epoch."""
        return sum(self.sizes)

    def visits(self, micro_batch: int) -> range:
        return range(micro_batch * self.batch_size, (micro_batch + 1) * self.batch_size)

    def rows(self, micro_batch: int) -> list[int]:
        """The dataset rows of the visits of a micro-batch."""
        bucket, number = self.place(micro_batch)
        first = number * self.batch_size
        return [self._row(bucket, visit) for visit in range(first, first + self.batch_size)]

    def place(self, micro_batch: int) -> tuple[int, int]:
        """The bucket of a micro-batch, and which of that bucket's micro-batches it is."""
        epoch = self.epoch_of(micro_batch)
        starts, ends = self._full(epoch), self._full(epoch + 1)
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        order = permutation(sum(counts), key("batches", self.seed, self.fingerprint, epoch))
        index, ahead = order[micro_batch - sum(starts)], list(accumulate(counts))
        bucket = bisect_right(ahead, index)
        return bucket, starts[bucket] + index - (ahead[bucket] - counts[bucket])

    def epoch_of(self, micro_batch: int) -> int:
        """The epoch, counted from 0, in which a micro-batch is trained on."""
        # each bucket falls short of n / B micro-batches per epoch by less than one in all
        least = micro_batch * self.batch_size // self.epoch_size
        most = least + len(self.buckets) * self.batch_size // self.epoch_size + 1
        return (
            least
            + bisect_right(range(least, most + 1), micro_batch, key=lambda e: sum(self._full(e)))
            - 1
        )

    def _full(self, epochs: int) -> list[int]:
        """How many micro-batches of each bucket are full after so many epochs."""
        return [epochs * size // self.batch_size for size in self.sizes]

    def _row(self, bucket: int, visit: int) -> int:
        epoch, position = divmod(visit, self.sizes[bucket])
        shuffled = permutation(
            self.sizes[bucket], key("epoch", self.seed, self.fingerprint, bucket, epoch)
        )
        place = shuffled[position]
        for segment in self.buckets[bucket]:
            if place < segment.visits:
                return segment.first + place % segment.count
            place -= segment.visits
        raise AssertionError("a place beyond the bucket")
