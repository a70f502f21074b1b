"""Streams of samples: in batches, and through threads that work ahead."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from common.process import available_cores

IMAGES_AHEAD = 32
"""Images that are read before they are needed."""
VIDEOS_AHEAD = 2
"""The same for videos, whose clips take hundreds of MB."""
MAX_THREADS = 8
Item = TypeVar("Item")
Result = TypeVar("Result")


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items; the last one may be shorter."""
    remaining = iter(items)
    while True:
        batch = list(islice(remaining, size))
        if not batch:
            return
        yield batch


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], num_ahead: int
) -> Iterator[Result]:
    """Yield the result of each item in order. Threads work a limited number of items ahead."""
    num_threads = min(MAX_THREADS, available_cores())
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
