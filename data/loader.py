"""Batches of a run, made ahead of time by worker threads."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch

from data.batches import Batch, MicroBatches

AHEAD = 2  # batches per thread that may wait for the loop


def load_micro_batches(
    source: MicroBatches, numbers: Iterable[int], num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """The micro-batches `numbers` of `source`, in order; `num_workers` threads make them ahead of
    time.

    Threads, not processes: nearly all of a batch's time goes into reads and random bits, in which they do not hold
    Python's lock, and what a process would make had to be sent here through shared memory, which costs twice as much.
    """

    def make(number: int) -> Batch:
        return source[number].pin_memory() if pin_memory else source[number]

    if not num_workers:
        yield from map(make, numbers)
        return
    # a thread begins on the first GPU, and pinning memory there would take some of that GPU from
    # its own process
    device = torch.cuda.current_device() if pin_memory else None
    begin = None if device is None else partial(torch.cuda.set_device, device)
    pool, ahead = ThreadPoolExecutor(num_workers, "data", begin), deque[Future[Batch]]()
    try:
        for number in numbers:
            ahead.append(pool.submit(make, number))
            if len(ahead) > AHEAD * num_workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
