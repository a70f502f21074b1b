"""Stops all processes when one of them fails, and prints the original error last.

A process that waits in a collective for one that has failed cannot do anything, not even on
SIGTERM, until a timeout. Each process therefore has a thread that watches the store of the process
group and ends the process.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from training.config import TrainConfig
from training.distributed.accelerator import is_enabled
from training.distributed.run_store import shared_store

POLL_EVERY = 0.5
BEAT_EVERY = 5.0
"""Seconds between two heartbeats of a process, with which it shows that it is not lost."""
EXIT_DELAY = 1.5
"""Seconds before the other processes end: torchrun, which counts whole ones, blames the process
that ended first."""
GRACE_PERIOD = 4.0
"""Seconds in which the others notice a failure."""
CONNECTION_ERRORS = (
    "Connection closed by peer",
    "Timed out waiting",
    "Connection reset",
    "Broken pipe",
    "NCCL",
    "Read error",
)


class FailureWatch:
    """Tells the processes of a run about the failure of one of them."""

    def __init__(self, accelerator: Accelerator):
        self.rank = accelerator.process_index
        self.store: dist.Store | None = None
        self.on_failure: Callable[[int, str], object] | None = None
        """Called with exit code and report of another process that ended the run, before this process
        ends."""
        self.heartbeat_keys: list[str] = []
        """Keys of counters in the store, which each process counts up."""
        if accelerator.num_processes == 1:
            return
        self.store, self.key = shared_store(accelerator, "failed")
        for rank in range(accelerator.num_processes):
            self.heartbeat_keys.append(f"{self.key}/heartbeat/{rank}")
        self.is_over = threading.Event()
        own_connection = self.store.clone()  # type: ignore[attr-defined]
        self.thread = threading.Thread(target=self._watch, args=(own_connection,), daemon=True)
        self.thread.start()

    def _watch(self, store: dist.Store) -> None:
        next_beat = 0.0
        try:
            while not self.is_over.wait(POLL_EVERY):
                now = time.monotonic()
                if now >= next_beat:
                    store.add(self.heartbeat_keys[self.rank], 1)
                    next_beat = now + BEAT_EVERY
                if store.check([self.key]):
                    report = store.get(self.key).decode(errors="replace")
                    exit_code, _, text = report.partition(" ")
                    if self.on_failure is not None:
                        self.on_failure(int(exit_code), text)
                    time.sleep(EXIT_DELAY)
                    end_process(int(exit_code))
        except Exception:  # the store ended with the process or the launcher that held it
            if not self.is_over.wait(GRACE_PERIOD):
                print(
                    f"error: rank {self.rank}: the launcher or rank 0 has ended",
                    file=sys.stderr,
                    flush=True,
                )
                end_process(1)

    def report(self, error: BaseException, exit_code: int = 1) -> bool:
        """Tell the other processes about `error`; return whether it is the first failure.

        Only the first process to fail prints its error; the others end silently, with
        `exit_code`."""
        if self.store is None:
            return True
        self.is_over.set()
        own_report = f"{exit_code} rank {self.rank}: {type(error).__name__}: {error}"
        first_report = self._first_report(self.store, own_report)
        if first_report not in (None, own_report):
            return False
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):
            get_error_handler().record_exception(error)  # for torchrun's summary
        return True

    def _first_report(self, store: dist.Store, own_report: str) -> str | None:
        """Store the report unless there is one; return the report in the store, or None if it does
        not answer."""
        answers: list[str] = []

        def compare_and_set() -> None:
            with suppress(Exception):
                answers.append(store.compare_set(self.key, "", own_report).decode(errors="replace"))

        thread = threading.Thread(target=compare_and_set, daemon=True)
        thread.start()
        thread.join(GRACE_PERIOD)  # without a connection the store never answers
        return answers[0] if answers else None

    def wait_for_others(self) -> None:
        """Give the other processes time to read the report, before this one takes the store away."""
        if self.store is not None:
            time.sleep(GRACE_PERIOD)

    def close(self) -> None:
        """Stop watching."""
        if self.store is not None:
            self.is_over.set()
            self.thread.join(2 * POLL_EVERY)


def end_process(exit_code: int) -> None:
    """End this process at once, also if one of its threads never returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def describe_error(error: BaseException, config: TrainConfig | None = None) -> str:
    """Return an unexpected error with its traceback and advice. `config`: of the run that it ends."""
    text = "".join(traceback.format_exception(error)).rstrip()
    if isinstance(error, RuntimeError) and any(
        phrase in str(error) for phrase in CONNECTION_ERRORS
    ):
        text += "\n\nAnother process, its node or the network has failed. Its log may contain the reason."
    has_advice = getattr(error, "has_advice", False)  # encoding adds its own
    if isinstance(error, torch.OutOfMemoryError) and config is not None and not has_advice:
        text += f"\nTo use less memory, try {', or '.join(memory_advice(config))}"
    return text


def memory_advice(config: TrainConfig) -> list[str]:
    """Return options that need less GPU memory than `config`; those that do not change the result
    come first."""
    advice = []
    is_sharded = is_enabled("ACCELERATE_USE_FSDP")
    has_zero = is_enabled("ACCELERATE_USE_DEEPSPEED")
    if not (config.memory.chooses_options or is_sharded or has_zero):
        advice.append("--memory.budget auto")
    batch_size, accumulation = config.batch_size, config.grad_accumulation_steps
    if not config.gradient_checkpointing:
        advice.append("--gradient_checkpointing")
    if batch_size > 1:
        divisor = 2 if batch_size % 2 == 0 else batch_size
        advice.append(
            f"--batch_size {batch_size // divisor} --grad_accumulation_steps {accumulation * divisor} "
            f"(now {batch_size} and {accumulation})"
        )
    if config.gradient_checkpointing and config.checkpoint_blocks is not None:
        advice.append(f"--checkpoint_blocks None (now {config.checkpoint_blocks})")
    depth = config.checkpoint_depth
    if config.gradient_checkpointing and depth > 1:
        advice.append(f"--checkpoint_depth 1 if the model is a transformer (now {depth})")
    quantization = config.model.quantization
    offload = config.memory.offload_blocks
    can_offload = config.gradient_checkpointing and not is_sharded and not has_zero
    if can_offload and offload != "all":
        advice.append(f"--memory.offload_blocks all (now {offload})")
    if not is_sharded and quantization == "none":
        advice.append(
            "on several GPUs accelerate launch --config_file accelerate_configs/fsdp2.yaml"
        )
    can_quantize = config.compile != "blocks" and not is_sharded and not has_zero
    if can_quantize and quantization != "nf4":
        advice.append(f"--model.quantization nf4 in a new --output_dir (now {quantization})")
    if config.training_dtype == "fp32":
        advice.append("--training_dtype bf16")
    return [*advice, f"a --data.resolution below {config.data.resolution}"]
