"""Engines: passes through the denoiser, gradients averaged over all processes, and the update of
the weights.

Each process holds all adapters. DDP, which sees only them, sums their gradients once per step, in
flat buckets. FSDP2 shards the frozen base model alone (sharding.py). Its gathers carry no adapters,
checkpoints need no gathering, and the optimizer works on plain tensors. DeepSpeed has its own
engine (deepspeed.py).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lora_algos.adapted_model import AdaptedModel
from training.checkpoints.state import NamedState, load_named_optimizer_state, named_optimizer_state
from training.config import OptimConfig
from training.optim.schedule import SkipNonFinite

MAX_BUCKET_MIB = 100
"""Size of a bucket of gradients, which DDP sums while the backward pass computes the next one."""


class Engine:
    """One process, DDP or FSDP2."""

    def __init__(
        self,
        config: OptimConfig,
        accelerator: Accelerator,
        denoiser: nn.Module,
        adapted: AdaptedModel,
        optimizer: torch.optim.Optimizer,
    ):
        self.accelerator, self.optimizer = accelerator, optimizer
        self.adapted, self.names = adapted, adapted.named_parameters()
        self.trained = list(self.names.values())
        self.max_grad_norm = config.max_grad_norm or float("inf")
        self.skipping_optimizer: SkipNonFinite | None = None
        if config.on_non_finite == "skip":
            self.skipping_optimizer = SkipNonFinite(optimizer)
        self.denoiser = prepare_denoiser(accelerator, denoiser, adapted)
        adapted.prepare_once_per_step()

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


def prepare_denoiser(
    accelerator: Accelerator, denoiser: nn.Module, adapted: AdaptedModel
) -> nn.Module:
    """Move the denoiser to its device, with autocast and averaged gradients."""
    # evaluation mode sets only device and autocast: Accelerate's DDP would broadcast the base model
    denoiser = accelerator.prepare_model(denoiser, evaluation_mode=True)
    if accelerator.num_processes == 1:
        return denoiser
    trained = set(adapted.named_parameters().values())
    frozen_names = [name for name, _ in denoiser.named_buffers()]
    for name, parameter in denoiser.named_parameters():
        if parameter not in trained:
            frozen_names.append(name)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(denoiser, frozen_names)
    return DistributedDataParallel(
        denoiser,
        bucket_cap_mb=MAX_BUCKET_MIB,
        gradient_as_bucket_view=True,
        forward_sync_buffers=False,
    )
