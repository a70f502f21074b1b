"""Engines: passes through the denoiser, gradients averaged over all processes, and the update of
the weights.

In every engine each process holds all adapters, and DDP, which sees nothing but them, sums their
gradients once per step in one flat bucket. FSDP2 shards the frozen base model alone: its gathers
carry no adapter, no gradient is scattered, checkpoints need no gathering, and the optimizer works
on plain tensors. DeepSpeed is in deepspeed.py.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import ConfigError
from lora_algos.adapted_model import AdaptedModel
from models.blocks import find_blocks
from training.checkpoints.state import NamedState, load_named_optimizer_state, named_optimizer_state
from training.config import TrainConfig
from training.optim.schedule import SkipNonFinite


class Engine:
    """One process, DDP or FSDP2."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        denoiser: nn.Module,
        adapted: AdaptedModel,
        optimizer: torch.optim.Optimizer,
    ):
        self.accelerator, self.optimizer = accelerator, optimizer
        self.adapted, self.names = adapted, adapted.named_parameters()
        self.trained = list(self.names.values())
        self.max_grad_norm = config.optim.max_grad_norm or float("inf")
        self.skipping_optimizer = (
            SkipNonFinite(optimizer) if config.optim.on_non_finite == "skip" else None
        )
        self.denoiser = prepare_denoiser(accelerator, denoiser, adapted)

    def accumulating(self, is_last: bool) -> AbstractContextManager:
        """Return the context of a micro-batch's passes. Gradients are averaged in the last one of a
        step."""
        if is_last or not isinstance(self.denoiser, DistributedDataParallel):
            return nullcontext()
        return self.denoiser.no_sync()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Compute gradients. `loss`: divided by the number of micro-batches of a step."""
        self.accelerator.backward(loss)

    def update(self, learning_rate: float) -> Tensor:
        """Update the weights; return the gradient norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        self.set_learning_rate(learning_rate)
        if self.skipping_optimizer is None:
            self.optimizer.step()
        else:
            self.skipping_optimizer.step(norm)
        self.optimizer.zero_grad()
        return norm.detach()

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]

    def optimizer_state(self) -> NamedState:
        """Return the whole optimizer state by parameter name, on the main process. Collective."""
        if not self.accelerator.is_main_process:
            return {}
        return named_optimizer_state(self.optimizer, self.names)

    def load(self, adapter: dict[str, Tensor], optimizer: NamedState) -> None:
        """Load weights and optimizer state. Raises CheckpointError or AdapterError if they do not
        fit."""
        self.adapted.load_state_dict(adapter)
        load_named_optimizer_state(self.optimizer, optimizer, self.names)


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether the base model is sharded."""
    return accelerator.distributed_type is DistributedType.FSDP


def needs_contiguous_weights(accelerator: Accelerator) -> bool:
    """Return whether an engine communicates weights in their memory layout."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def prepare_denoiser(
    accelerator: Accelerator, denoiser: nn.Module, adapted: AdaptedModel
) -> nn.Module:
    """Move the denoiser to its device, with autocast, a sharded base if configured, and averaged
    gradients."""
    if is_sharded(accelerator):
        plugin = accelerator.state.fsdp_plugin
        assert plugin is not None
        adapter_parameters = set(adapted.all_parameters().values())
        shard_base(denoiser, adapter_parameters, plugin)
        for parameter in adapter_parameters:
            parameter.data = parameter.data.to(accelerator.device)
    # evaluation mode: only device and autocast. Accelerate's DDP would broadcast the frozen base
    # model
    denoiser = accelerator.prepare_model(denoiser, evaluation_mode=True)
    if accelerator.num_processes == 1:
        return denoiser
    trained = set(adapted.named_parameters().values())
    frozen_names = [
        name for name, parameter in denoiser.named_parameters() if parameter not in trained
    ]
    frozen_names += [name for name, _ in denoiser.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(denoiser, frozen_names)
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return DistributedDataParallel(
        denoiser,
        bucket_cap_mb=num_bytes // 2**20 + 1,
        gradient_as_bucket_view=True,
        forward_sync_buffers=False,
    )


def shard_base(
    denoiser: nn.Module, ignored: set[nn.Parameter], plugin: FullyShardedDataParallelPlugin
) -> None:
    """Shard the weights block by block, except the `ignored` ones."""
    from torch.distributed.fsdp import fully_shard

    options = {"reshard_after_forward": plugin.reshard_after_forward, "ignored_params": ignored}
    if plugin.cpu_offload:
        options["offload_policy"] = plugin.cpu_offload
    for block in blocks_to_shard(denoiser, plugin.transformer_cls_names_to_wrap):
        fully_shard(block, **options)
    fully_shard(
        denoiser, **{**options, "reshard_after_forward": False}
    )  # the rest is needed at both ends of a step


def blocks_to_shard(denoiser: nn.Module, class_names: list[str] | None) -> list[nn.Module]:
    """Return the blocks that are sharded one by one, inner ones first.

    These are the modules of the given classes, else of the classes that the model names as unsplittable, else the
    top-level blocks."""
    names = class_names or getattr(denoiser, "_no_split_modules", None) or ()
    blocks = [
        module
        for module in denoiser.modules()
        if type(module).__name__ in names and module is not denoiser
    ]
    missing_names = {*(class_names or ())} - {type(module).__name__ for module in blocks}
    if missing_names:
        known_blocks = find_blocks(denoiser, 2).values()
        known_names = ", ".join(sorted({type(block).__name__ for block in known_blocks}))
        raise ConfigError(
            f"fsdp_transformer_layer_cls_to_wrap: the model has no {', '.join(sorted(missing_names))}. "
            f"It has {known_names}"
        )
    return blocks[::-1] or list(find_blocks(denoiser, 1).values())
