"""Batches of a run, made ahead of time by worker threads."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch

from data.batches import Batch, MicroBatches

BATCHES_AHEAD = 2
"""Batches per thread that may wait for the training loop."""


def load_micro_batches(
    source: MicroBatches, numbers: Iterable[int], num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Yield the micro-batches with these numbers, in order. Threads make them ahead of time.

    Threads are used instead of processes. Nearly all time goes into reads and random bits, which
    release Python's lock. A process would have to send its batch through shared memory, which
    costs twice as much."""

    def make_batch(number: int) -> Batch:
        batch = source[number]
        return batch.pin_memory() if pin_memory else batch

    if not num_workers:
        yield from map(make_batch, numbers)
        return
    # a new thread uses the first GPU, and pinning memory would allocate some of that GPU's memory
    initialize = None
    if pin_memory:
        initialize = partial(torch.cuda.set_device, torch.cuda.current_device())
    pool = ThreadPoolExecutor(num_workers, "data", initialize)
    waiting: deque[Future[Batch]] = deque()
    try:
        for number in numbers:
            waiting.append(pool.submit(make_batch, number))
            if len(waiting) > BATCHES_AHEAD * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
