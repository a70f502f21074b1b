"""FSDP2's shards of the frozen base model, block by block."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from common.errors import ConfigError
from lora_algos.adapted_model import AdaptedModel
from models.base import ModelFamily

SHARDING_ENGINES = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether the base model is sharded."""
    return accelerator.distributed_type is DistributedType.FSDP


def needs_contiguous_weights(accelerator: Accelerator) -> bool:
    """Return whether an engine communicates weights in their memory layout."""
    return accelerator.distributed_type in SHARDING_ENGINES


def shard_base(
    plugin: FullyShardedDataParallelPlugin,
    device: torch.device,
    family: ModelFamily,
    adapted: AdaptedModel,
) -> None:
    """Shard the weights of the base model. Each process keeps whole adapters, on its device."""
    from torch.distributed.fsdp import fully_shard

    denoiser = adapted.model
    adapter_parameters = set(adapted.all_parameters().values())
    options: dict[str, Any] = {"ignored_params": adapter_parameters}
    if plugin.cpu_offload:
        options["offload_policy"] = plugin.cpu_offload
    for block in blocks_to_shard(family, denoiser, plugin.transformer_cls_names_to_wrap):
        fully_shard(block, reshard_after_forward=plugin.reshard_after_forward, **options)
    # the remaining weights are needed at both ends of a step
    fully_shard(denoiser, reshard_after_forward=False, **options)
    for parameter in adapter_parameters:
        parameter.data = parameter.data.to(device)


def blocks_to_shard(
    family: ModelFamily, denoiser: nn.Module, class_names: list[str] | None
) -> list[nn.Module]:
    """Return the blocks that are sharded one by one, inner ones first.

    These are the modules of the given classes, else the blocks of the family."""
    if not class_names:
        return list(family.blocks(denoiser).values())
    blocks = []
    for module in denoiser.modules():
        if type(module).__name__ in class_names and module is not denoiser:
            blocks.append(module)
    class_names_of_blocks = {type(block).__name__ for block in blocks}
    missing_names = set(class_names) - class_names_of_blocks
    if missing_names:
        known_blocks = family.blocks(denoiser, depth=2).values()
        known_names = sorted({type(block).__name__ for block in known_blocks})
        raise ConfigError(
            "fsdp_transformer_layer_cls_to_wrap: the model has no "
            f"{', '.join(sorted(missing_names))}. It has {', '.join(known_names)}"
        )
    return blocks[::-1]
