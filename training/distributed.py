"""The Accelerator of a run, and the denoiser as its engine wants it.

Process count, sharding and mixed precision belong to Accelerate's config; a config of ours that says otherwise is
refused. In every engine the adapters are whole on every rank, and DDP, which sees nothing but them, sums their
gradients once per step in one flat bucket. FSDP2 shards the frozen base alone: its gathers carry no adapter and nothing
is scattered, checkpoints need no gathering, and the optimizer works on plain tensors.
"""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from torch import nn

from lora_algos.attach import Adapted
from training import checkpointing
from training.config import ConfigError, TrainConfig


class DistributedError(RuntimeError):
    """Ranks that should be alike are not, or one of them is lost."""


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Raises ConfigError where Accelerate's config and ours contradict each other."""
    precision = "bf16" if config.training_dtype == "bf16" else "no"
    if faults := conflicts(config, precision):
        raise ConfigError("\n  ".join(["accelerate was launched with what does not fit", *faults]))
    accelerator = Accelerator(
        mixed_precision=precision,
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
    if asked("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        faults.append("DeepSpeed, which is not supported. Use ddp.yaml, or fsdp2.yaml where the base is too large")
    if asked("ACCELERATE_USE_FSDP", "false") == "true":
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


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type is DistributedType.FSDP


def prepare(accelerator: Accelerator, denoiser: nn.Module, adapted: Adapted) -> nn.Module:
    """The denoiser on its device, under autocast, its base sharded if so configured, its adapters the same on all ranks
    and with gradients that are means over them."""
    trained = set(adapted.named_parameters().values())
    if is_sharded(accelerator):
        plugin = accelerator.state.fsdp_plugin
        assert plugin is not None
        shard_base(denoiser, trained, plugin)
        for parameter in trained:
            parameter.data = parameter.data.to(accelerator.device)
    # evaluation mode: device and autocast only. Accelerate's DDP would send the frozen base to all ranks at the start
    denoiser = accelerator.prepare_model(denoiser, evaluation_mode=True)
    if accelerator.num_processes == 1:
        return denoiser
    frozen = [name for name, parameter in denoiser.named_parameters() if parameter not in trained]
    frozen += [name for name, _ in denoiser.named_buffers()]
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(denoiser, frozen)
    size = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return ddp(denoiser, bucket_cap_mb=size // 2**20 + 1, gradient_as_bucket_view=True, forward_sync_buffers=False)


def shard_base(denoiser: nn.Module, trained: set[nn.Parameter], plugin: FullyShardedDataParallelPlugin) -> None:
    """Shards the frozen weights block by block."""
    from torch.distributed.fsdp import fully_shard

    options = {"reshard_after_forward": plugin.reshard_after_forward, "ignored_params": trained}
    if plugin.cpu_offload:
        options["offload_policy"] = plugin.cpu_offload
    for block in blocks(denoiser, plugin.transformer_cls_names_to_wrap):
        fully_shard(block, **options)
    fully_shard(denoiser, **{**options, "reshard_after_forward": False})  # its rest is needed at both ends of a step


def blocks(denoiser: nn.Module, classes: list[str] | None) -> list[nn.Module]:
    """The modules of `classes`, else of those that the model names as not to be split, else its top-level blocks; inner
    ones first."""
    names = classes or getattr(denoiser, "_no_split_modules", None) or ()
    found = [module for module in denoiser.modules() if type(module).__name__ in names and module is not denoiser]
    if classes and (missing := {*classes} - {type(module).__name__ for module in found}):
        here = ", ".join(sorted({type(block).__name__ for block in checkpointing.blocks_at(denoiser, 2).values()}))
        raise ConfigError(
            f"fsdp_transformer_layer_cls_to_wrap: the model has no {', '.join(sorted(missing))}; it has {here}"
        )
    return found[::-1] or list(checkpointing.blocks_at(denoiser, 1).values())


def checksums(tensors: list[torch.Tensor]) -> torch.Tensor:
    """(n,) int64, equal for equal bits; on their device, where nothing is read."""
    return torch.stack([tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64) for tensor in tensors])
