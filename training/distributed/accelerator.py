"""The Accelerator of a run. Accelerate's config sets the number of processes, sharding and mixed
precision.

Options of this trainer that contradict it are errors.
"""

import os
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from common.errors import ConfigError, bullet_list
from training.config import DistributedConfig, TrainConfig
from training.distributed.device import unused_gpu_notes
from training.numerics import apply_numerics
from training.optim.registry import OPTIMIZERS

FSDP_SETTINGS = {
    "FSDP_VERSION": ("2", "this trainer supports FSDP2 only"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "--gradient_checkpointing decides"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "false",
        "it would leave the encoders of all processes but one empty",
    ),
    "FSDP_AUTO_WRAP_POLICY": ("TRANSFORMER_BASED_WRAP", "the model is sharded by blocks"),
}
"""Setting -> the supported value, and the reason."""


class DistributedError(RuntimeError):
    """Processes that are out of sync, or a process that is lost."""


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Build the Accelerator, and set the numerics of its device.

    Raises ConfigError if Accelerate's config and the options contradict each other."""
    precision = "bf16" if config.training_dtype == "bf16" else "no"
    errors = launch_errors(config, precision)
    if errors:
        raise ConfigError(
            bullet_list("accelerate was launched with settings that do not fit", errors)
        )
    uses_deepspeed = is_enabled("ACCELERATE_USE_DEEPSPEED")
    accelerator = Accelerator(
        mixed_precision="no"
        if uses_deepspeed
        else precision,  # DeepSpeed would convert the adapters to bf16 too
        log_with=None if config.tracking.report_to == "none" else config.tracking.report_to,
        project_dir=config.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=collective_timeout(config.distributed))],
    )
    apply_numerics(config)  # last, because Accelerate's dynamo settings change it too
    check_accelerator(accelerator)
    return accelerator


def check_accelerator(accelerator: Accelerator) -> None:
    """Raise ConfigError if Accelerate ignored the number of processes or the engine of the launch
    command."""
    num_launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != num_launched:
        notes = "".join(f"\n  {note}" for note in unused_gpu_notes())
        raise ConfigError(
            f"{num_launched} processes were launched, but Accelerate connected "
            f"{accelerator.num_processes}: each would train on its own. Without GPUs, set "
            f"ACCELERATE_USE_CPU=true{notes}"
        )
    engine = accelerator.distributed_type.value
    for name in ("FSDP", "DEEPSPEED"):
        if is_enabled(f"ACCELERATE_USE_{name}") and engine != name:
            raise ConfigError(
                f"accelerate was launched with {name}, but Accelerate uses {engine} instead, as it "
                "does without GPUs. Use accelerate_configs/ddp.yaml"
            )


def is_enabled(variable: str) -> bool:
    return os.environ.get(variable, "false") == "true"


def collective_timeout(config: DistributedConfig) -> timedelta:
    return timedelta(minutes=config.timeout_minutes)


def launch_errors(config: TrainConfig, precision: str) -> list[str]:
    """Return settings of `accelerate launch` that contradict the config, or that this trainer
    replaces."""
    environment = os.environ.get
    errors = []
    launched_precision = environment("ACCELERATE_MIXED_PRECISION", "no")
    if launched_precision not in ("no", precision):
        errors.append(
            f"mixed_precision {launched_precision}, but training_dtype is {config.training_dtype}. "
            "Leave mixed_precision at no: --training_dtype decides"
        )
    if int(environment("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != 1:
        errors.append(
            "gradient_accumulation_steps. Leave it at 1: --grad_accumulation_steps decides"
        )
    if (
        int(environment("TORCHELASTIC_MAX_RESTARTS", "0"))
        and environment("TORCHELASTIC_USE_AGENT_STORE") == "True"
    ):
        errors.append(
            "max_restarts. Also set --rdzv_backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: "
            "without them restarted processes wait for processes that have ended"
        )
    backend = environment("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        errors.append(f"dynamo_backend {backend}. Leave it at no: --compile blocks decides")
    return [*errors, *engine_errors(config)]


def sharding_engines() -> list[str]:
    """Return the engines of the launch that shard the model, by Accelerate's names."""
    return [name for name in ("FSDP", "DEEPSPEED") if is_enabled(f"ACCELERATE_USE_{name}")]


def engine_errors(config: TrainConfig) -> list[str]:
    """Return options that FSDP or DeepSpeed does not support."""
    errors: list[str] = []
    engines = sharding_engines()
    if config.model.train_text_encoder and engines:
        errors.append(
            f"{engines[0]}, which does not support --model.train_text_encoder. Use ddp.yaml"
        )
    if config.model.quantization != "none" and engines:
        errors.append(
            f"{engines[0]}, which does not support --model.quantization. Use ddp.yaml, or "
            "--model.quantization none"
        )
    if config.memory.num_offloaded(1) and engines:
        errors.append(
            f"{engines[0]}, which does not support --memory.offload_blocks. Use ddp.yaml, or FSDP2's "
            "own fsdp_offload_params: true"
        )
    if config.memory.chooses_options and engines:
        errors.append(
            f"{engines[0]}, for which --memory.budget cannot plan. Use --memory.budget none"
        )
    if "DEEPSPEED" in engines:
        errors += zero_errors(config)
    if "FSDP" in engines:
        errors += fsdp_errors()
    return errors


def fsdp_errors() -> list[str]:
    """Return FSDP settings that this trainer does not support."""
    errors = []
    for name, (supported, reason) in FSDP_SETTINGS.items():
        value = os.environ.get(name, supported)
        if value.upper() != supported.upper():
            errors.append(f"{name.lower()} {value}. Set it to {supported}: {reason}")
    return errors


def zero_errors(config: TrainConfig) -> list[str]:
    """Return options that DeepSpeed's ZeRO does not support."""
    errors = []
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("1", "2"):
        errors.append(f"zero_stage {stage}. Use 2, or fsdp2.yaml to shard the base model")
    if config.optim.on_non_finite == "skip":
        errors.append("DeepSpeed, which does not support --optim.on_non_finite skip. Use ddp.yaml")
    if not OPTIMIZERS[config.optimizer].is_elementwise:
        supported = ", ".join(name for name, entry in OPTIMIZERS.items() if entry.is_elementwise)
        errors.append(
            f"DeepSpeed, which does not support {config.optimizer}: it cannot update parts of "
            f"flattened weights. Use ddp.yaml, or one of {supported}"
        )
    return errors
