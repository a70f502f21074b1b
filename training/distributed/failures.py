"""A rank's failure reaches the others: all stop within seconds, and what came first is what is said last.

A rank that waits in a collective for one that has failed cannot do anything, not even on SIGTERM, until a timeout. So
each has a thread that looks into the store of the process group, and ends the process.
"""

import os
import sys
import threading
import time
import traceback
from contextlib import suppress

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from training.config import TrainConfig

EVERY = 0.5  # seconds between two looks
LOST = ("Connection closed by peer", "Timed out waiting", "Connection reset", "Broken pipe", "NCCL", "Read error")
LATER = 1.5  # seconds: torchrun, which counts whole ones, takes the process that ended first for the cause
GRACE = 4.0  # seconds in which the others see a failure


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
        try:
            while not self.over.wait(EVERY):
                if store.check([self.key]):
                    time.sleep(LATER)
                    os._exit(1)
        except Exception:  # the store is gone with the rank or the launcher that kept it
            if not self.over.wait(GRACE):
                print(f"error: rank {self.rank}: the launcher, or rank 0, is gone", file=sys.stderr, flush=True)
                os._exit(1)

    def is_first(self, error: BaseException) -> bool:
        """Tells the other ranks of `error`, unless one of them has failed before. That one then says why it did, and
        the others end in silence."""
        if self.store is None:
            return True
        self.over.set()
        mine = f"{self.rank}: {type(error).__name__}: {error}"
        answer: list[str] = []
        store = self.store

        def ask() -> None:
            with suppress(Exception):
                answer.append(store.compare_set(self.key, "", mine).decode(errors="replace"))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(GRACE)  # over a dead link the store never answers
        if answer and answer[0] != mine:
            return False
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):
            get_error_handler().record_exception(error)  # torchrun's summary names it then
        return True

    def wait_for_others(self) -> None:
        """Gives the other ranks time to see what `is_first` told them, before this one takes the store away."""
        if self.store is not None:
            time.sleep(GRACE)

    def close(self) -> None:
        """No one is to be told any more."""
        if self.store is not None:
            self.over.set()
            self.thread.join(2 * EVERY)


def explained(error: BaseException, config: TrainConfig | None = None) -> str:
    """An unexpected error with its traceback; `config`: of a run that ends with it."""
    text = "".join(traceback.format_exception(error)).rstrip()
    if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST):
        text += "\n\nAnother rank, its node or the network is gone; if that rank could say why, its log does."
    told = hasattr(error, "__notes__")  # in the traceback, by what knows more: encoding
    if isinstance(error, torch.OutOfMemoryError) and config is not None and not told:
        text += f"\nWhat takes less memory: {', or '.join(smaller(config))}"
    return text


def smaller(config: TrainConfig) -> list[str]:
    """What takes less of a GPU's memory than `config`, beginning with what changes nothing of the result."""
    ways, size, steps = [], config.batch_size, config.grad_accumulation_steps
    if not config.gradient_checkpointing:
        ways.append("--gradient_checkpointing")
    if size > 1:
        parts = 2 if size % 2 == 0 else size
        ways.append(f"--batch_size {size // parts} --grad_accumulation_steps {steps * parts} (now {size} and {steps})")
    if os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        ways.append("on several GPUs accelerate launch --config_file accelerate_configs/fsdp2.yaml")
    if config.training_dtype == "fp32":
        ways.append("--training_dtype bf16")
    return [*ways, f"a --data.resolution below {config.data.resolution}"]
