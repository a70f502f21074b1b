"""Which samples meet in which step, as a pure function of (seed, dataset, batch size): there is no sampler state.

Visit v (v = 0, 1, 2, ...) is one sample seen once; micro-batch m holds the visits from
m * batch_size to (m + 1) * batch_size - 1.
Step s on W ranks with accumulation A consumes micro-batches s*W*A ... (s+1)*W*A - 1, of which rank r takes those with
m mod W = r. So one rank with A = 4, two with A = 2 and four with A = 1 train on the same samples in the same step.
Every epoch is a new permutation, and a batch may span two epochs: none is ever smaller.
"""

import hashlib
import struct
from dataclasses import dataclass, field

import numpy as np


def key(purpose: str, *numbers: int | str) -> int:
    """A 64-bit key that differs for every purpose and numbers: the seed of whatever is random there."""
    data = b"".join(struct.pack("<Q", n) if isinstance(n, int) else n.encode() + b"\0" for n in (purpose, *numbers))
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclass
class Schedule:
    """`epoch_rows`: the dataset row of each position in an epoch, repeats included."""

    epoch_rows: np.ndarray
    fingerprint: str
    seed: int
    batch_size: int
    _epoch: tuple[int, np.ndarray] = field(default=(-1, np.empty(0, dtype=np.int64)), repr=False)

    def row(self, visit: int) -> int:
        """The dataset row that is seen in `visit`."""
        epoch, position = divmod(visit, len(self.epoch_rows))
        if self._epoch[0] != epoch:
            # sorting the generator's raw bits, whose stream numpy guarantees; it does not guarantee `permutation`
            bits = np.random.Philox(key=key("epoch", self.seed, self.fingerprint, epoch))
            self._epoch = (epoch, np.argsort(bits.random_raw(len(self.epoch_rows)), kind="stable"))
        return int(self.epoch_rows[self._epoch[1][position]])

    def visits(self, micro_batch: int) -> range:
        return range(micro_batch * self.batch_size, (micro_batch + 1) * self.batch_size)
