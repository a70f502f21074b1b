"""How a step is taken: passes through the denoiser, gradients as means over all ranks, and the update.

In every engine the adapters are whole on every rank, and DDP, which sees nothing but them, sums their gradients once
per step in one flat bucket. FSDP2 shards the frozen base alone: its gathers carry no adapter, nothing is scattered,
checkpoints need no gathering, and the optimizer works on plain tensors. (DeepSpeed: training/distributed/deepspeed.py.)
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import ConfigError
from lora_algos.attach import Adapted
from training import gradient_checkpointing
from training.checkpoints.state import load_named_state, named_state
from training.config import TrainConfig
from training.optim.schedule import SkipNonFinite


class Engine:
    """One process, DDP or FSDP2."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, denoiser: nn.Module, adapted: Adapted,
        optimizer: torch.optim.Optimizer,
    ):  # fmt: skip
        self.accelerator, self.optimizer = accelerator, optimizer
        self.adapted, self.names = adapted, adapted.named_parameters()
        self.trained = list(self.names.values())
        self.limit = config.optim.max_grad_norm or float("inf")
        self.skipping = SkipNonFinite(optimizer) if config.optim.non_finite == "skip" else None
        self.denoiser = prepare(accelerator, denoiser, adapted)

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around the passes of a micro-batch: gradients are averaged over the ranks in the `last` one of a step."""
        if last or not isinstance(self.denoiser, DistributedDataParallel):
            return nullcontext()
        return self.denoiser.no_sync()

    def backward(self, loss: Tensor, last: bool) -> None:
        """`loss`: divided by the number of micro-batches of a step."""
        self.accelerator.backward(loss)

    def update(self, rate: float) -> Tensor:
        """Moves the weights at the learning rate `rate`; returns the norm of the gradient, before clipping."""
        norm = nn.utils.clip_grad_norm_(self.trained, self.limit)
        self.set_rate(rate)
        if self.skipping is None:
            self.optimizer.step()
        else:
            self.skipping.step(norm)
        self.optimizer.zero_grad()
        return norm.detach()

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """By parameter name, whole, on the main process. Collective."""
        return named_state(self.optimizer, self.names) if self.accelerator.is_main_process else {}

    def load(self, adapter: dict[str, Tensor], optimizer: dict[str, dict[str, Any]]) -> None:
        """Raises CheckpointError or AdapterError if they are not of these parameters."""
        self.adapted.load_state_dict(adapter)
        load_named_state(self.optimizer, optimizer, self.names)


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type is DistributedType.FSDP


def wants_contiguous(accelerator: Accelerator) -> bool:
    """Whether an engine sends weights around as they lie in memory."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def prepare(accelerator: Accelerator, denoiser: nn.Module, adapted: Adapted) -> nn.Module:
    """The denoiser on its device, under autocast, its base sharded if so configured, its adapters the same on all ranks
    and with gradients that are means over them."""
    if is_sharded(accelerator):
        plugin = accelerator.state.fsdp_plugin
        assert plugin is not None
        whole = set(adapted.all_parameters().values())
        shard_base(denoiser, whole, plugin)
        for parameter in whole:
            parameter.data = parameter.data.to(accelerator.device)
    # evaluation mode: device and autocast only. Accelerate's DDP would send the frozen base to all ranks at the start
    denoiser = accelerator.prepare_model(denoiser, evaluation_mode=True)
    if accelerator.num_processes == 1:
        return denoiser
    trained = set(adapted.named_parameters().values())
    frozen = [name for name, parameter in denoiser.named_parameters() if parameter not in trained]
    frozen += [name for name, _ in denoiser.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(denoiser, frozen)
    size = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return DistributedDataParallel(
        denoiser, bucket_cap_mb=size // 2**20 + 1, gradient_as_bucket_view=True, forward_sync_buffers=False
    )


def shard_base(denoiser: nn.Module, whole: set[nn.Parameter], plugin: FullyShardedDataParallelPlugin) -> None:
    """Shards the weights block by block, but for those that are to stay `whole`."""
    from torch.distributed.fsdp import fully_shard

    options = {"reshard_after_forward": plugin.reshard_after_forward, "ignored_params": whole}
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
        here = ", ".join(
            sorted({type(block).__name__ for block in gradient_checkpointing.blocks_at(denoiser, 2).values()})
        )
        raise ConfigError(
            f"fsdp_transformer_layer_cls_to_wrap: the model has no {', '.join(sorted(missing))}; it has {here}"
        )
    return found[::-1] or list(gradient_checkpointing.blocks_at(denoiser, 1).values())
