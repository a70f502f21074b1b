"""The Accelerator of a run. Process count and sharding belong to Accelerate's config and are only checked here."""

import os

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from training.config import ConfigError, TrainConfig


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Raises ConfigError where Accelerate's config and ours contradict each other."""
    precision = "bf16" if config.training_dtype == "bf16" else "no"
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        raise ConfigError(
            f"accelerate was launched with mixed_precision {launched}, but training_dtype is {config.training_dtype}. "
            "Leave mixed_precision at no: --training_dtype decides"
        )
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=config.grad_accumulation_steps,
        log_with=None if config.tracking.report_to == "none" else config.tracking.report_to,
        project_dir=config.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # frozen: the same everywhere
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world:
        raise ConfigError(
            f"{world} processes were launched, but Accelerate joined {accelerator.num_processes}: each would train on "
            "its own. Without GPUs, set ACCELERATE_USE_CPU=true"
        )
    return accelerator
