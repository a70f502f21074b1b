"""A barrier without a time limit, and the heartbeats that end it."""

import pytest
import torch.distributed as dist

from training.distributed import barrier
from training.distributed.accelerator import DistributedError
from training.distributed.barrier import BEAT_EVERY, Heartbeats

LOST_AFTER = 60.0


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves: a list of one number."""
    now = [1000.0]
    monkeypatch.setattr(barrier.time, "monotonic", lambda: now[0])
    return now


def test_a_process_without_heartbeat_is_lost(clock):
    store = dist.HashStore()
    heartbeats = Heartbeats(store, ["rank 0", "rank 1"], LOST_AFTER)
    heartbeats.check()
    while clock[0] <= 1000 + LOST_AFTER:
        store.add("rank 0", 1)
        heartbeats.check()
        clock[0] += BEAT_EVERY + 1
    with pytest.raises(DistributedError, match=r"rank 1 has not answered for 60 seconds"):
        heartbeats.check()


def test_a_slow_process_is_waited_for(clock):
    store = dist.HashStore()
    heartbeats = Heartbeats(store, ["rank 0"], LOST_AFTER)
    for _ in range(100):
        store.add("rank 0", 1)
        clock[0] += LOST_AFTER - 1
        heartbeats.check()


def test_the_store_is_asked_only_now_and_then(clock):
    store = dist.HashStore()
    heartbeats = Heartbeats(store, ["rank 0"], LOST_AFTER)
    heartbeats.check()
    store.add("rank 0", 1)
    heartbeats.check()
    assert heartbeats.counts == [0]
    clock[0] += BEAT_EVERY
    heartbeats.check()
    assert heartbeats.counts == [1]
