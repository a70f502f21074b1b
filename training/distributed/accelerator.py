"""The Accelerator of a run. Process count, sharding and mixed precision belong to Accelerate's config; a config of ours
that says otherwise is refused."""

import os
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from common.errors import ConfigError
from training.config import TrainConfig
from training.optim.registry import OPTIMIZERS


class DistributedError(RuntimeError):
    """Ranks that should be alike are not, or one of them is lost."""


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Raises ConfigError where Accelerate's config and ours contradict each other."""
    precision = "bf16" if config.training_dtype == "bf16" else "no"
    if faults := conflicts(config, precision):
        raise ConfigError("\n  ".join(["accelerate was launched with what does not fit", *faults]))
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    accelerator = Accelerator(
        mixed_precision="no" if zero else precision,  # DeepSpeed would make the adapters bf16 too
        log_with=None if config.tracking.report_to == "none" else config.tracking.report_to,
        project_dir=config.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout(config))],
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world:
        raise ConfigError(
            f"{world} processes were launched, but Accelerate joined {accelerator.num_processes}: each would train on "
            "its own. Without GPUs, set ACCELERATE_USE_CPU=true"
        )
    for engine in ("FSDP", "DEEPSPEED"):
        asked = os.environ.get(f"ACCELERATE_USE_{engine}", "false") == "true"
        got = accelerator.distributed_type.value
        if asked and got != engine:
            raise ConfigError(
                f"accelerate was launched with {engine}, but Accelerate made {got} of it, "
                "as it does without GPUs. Use ddp.yaml"
            )
    return accelerator


def timeout(config: TrainConfig) -> timedelta:
    return timedelta(minutes=config.distributed.timeout_minutes)


def conflicts(config: TrainConfig, precision: str) -> list[str]:
    """What `accelerate launch` set that contradicts the config, or that this trainer does another way."""
    faults, asked = [], os.environ.get
    launched = asked("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        faults.append(
            f"mixed_precision {launched}, but training_dtype is {config.training_dtype}. "
            "Leave mixed_precision at no: --training_dtype decides"
        )
    if int(asked("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != 1:
        faults.append("gradient_accumulation_steps. Leave it at 1: --grad_accumulation_steps decides")
    if int(asked("TORCHELASTIC_MAX_RESTARTS", "0")) and asked("TORCHELASTIC_USE_AGENT_STORE") == "True":
        faults.append(
            "max_restarts. Give --rdzv_backend c10d with it and set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: without them "
            "processes that are started again look for those that have died"
        )
    sharded = [name for name in ("FSDP", "DEEPSPEED") if asked(f"ACCELERATE_USE_{name}", "false") == "true"]
    if config.model.train_text_encoder and sharded:
        faults.append(f"{sharded[0]}, with --model.train_text_encoder, which was not tried with it. Use ddp.yaml")
    if "DEEPSPEED" in sharded:
        faults += zero_conflicts(config)
    if "FSDP" in sharded:
        refused = {
            "FSDP_VERSION": ("2", "fsdp_version must be 2"),
            "FSDP_ACTIVATION_CHECKPOINTING": ("false", "--gradient_checkpointing decides"),
            "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "it would leave the encoders of all ranks but one empty"),
            "FSDP_AUTO_WRAP_POLICY": ("TRANSFORMER_BASED_WRAP", "blocks are what is sharded"),
        }
        for name, (wanted, why) in refused.items():
            if asked(name, wanted).upper() != wanted.upper():
                faults.append(f"{name.lower()} {asked(name)}. Set it to {wanted}: {why}")
    return faults


def zero_conflicts(config: TrainConfig) -> list[str]:
    """What DeepSpeed's ZeRO cannot do of what the config asks for."""
    faults, stage = [], os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("1", "2"):
        faults.append(f"zero_stage {stage}. Use 2, or fsdp2.yaml to shard the base model")
    if config.optim.non_finite == "skip":
        faults.append("DeepSpeed, with --optim.non_finite skip. Use ddp.yaml for that")
    if not OPTIMIZERS[config.optimizer_name].elementwise:
        able = ", ".join(name for name, source in OPTIMIZERS.items() if source.elementwise)
        faults.append(
            f"DeepSpeed, with {config.optimizer_name}, which cannot work on shares of flattened weights. Use ddp.yaml, "
            f"or one of {able}"
        )
    return faults
