"""A rank's failure reaches the others: all stop within seconds, and what came first is what is said last.

A rank that waits in a collective for one that has failed cannot do anything, not even on SIGTERM, until a timeout. So
each has a thread that looks into the store of the process group, and ends the process.
"""

import json
import os
import threading
import time
import traceback
from contextlib import suppress

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

EVERY = 0.5  # seconds between two looks
LOST = ("Connection closed by peer", "Timed out waiting", "Connection reset", "Broken pipe", "NCCL", "Read error")
GRACE = 3.0  # seconds in which the others see a failure


class Failures:
    """What the ranks of this start of the run tell each other of failures."""

    def __init__(self, accelerator: Accelerator):
        self.rank, self.store = accelerator.process_index, None
        if accelerator.num_processes == 1:
            return
        token = [f"{time.time()}.{os.getpid()}"]  # the store outlives the processes that torchrun starts again
        broadcast_object_list(token)
        self.key = f"train_lora/failed/{token[0]}"
        self.store = dist.distributed_c10d._get_default_store()
        self.over = threading.Event()
        mine = self.store.clone()  # type: ignore[attr-defined]  # a connection of its own
        self.thread = threading.Thread(target=self._watch, args=(mine,), daemon=True)
        self.thread.start()

    def _watch(self, store: dist.Store) -> None:
        with suppress(Exception):  # the store is gone when the rank or the launcher that keeps it is
            while not self.over.wait(EVERY):
                if store.check([self.key]):
                    os._exit(1)

    def tell(self, error: BaseException) -> bool:
        """Tells the other ranks of `error`; whether it is the first. Then they have had time to leave."""
        if self.store is None:
            return True
        self.over.set()
        mine = json.dumps({"rank": self.rank, "error": f"{type(error).__name__}: {error}"})
        with suppress(Exception):
            if self.store.compare_set(self.key, "", mine).decode() != mine:
                return False
            time.sleep(GRACE)
        return True

    def close(self) -> None:
        """No one is to be told any more."""
        if self.store is not None:
            self.over.set()
            self.thread.join()


def explained(error: BaseException) -> str:
    """An unexpected error with its traceback."""
    text = "".join(traceback.format_exception(error)).rstrip()
    if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST):
        text += "\n\nAnother rank, its node or the network is gone; if that rank could say why, its log does."
    return text
