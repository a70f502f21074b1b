"""The key-value store of the process group, with keys that belong to one start of a run."""

import os
import time

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


def shared_store(accelerator: Accelerator, purpose: str) -> tuple[dist.Store, str]:
    """Return the store of the process group, and the key of a purpose. Collective.

    The store outlives processes that torchrun restarts, so each start gets another key."""
    start = time.time()
    token = [f"{start}.{os.getpid()}"]
    broadcast_object_list(token)
    store = dist.distributed_c10d._get_default_store()
    key = f"train_lora/{purpose}/{token[0]}"
    return store, key
