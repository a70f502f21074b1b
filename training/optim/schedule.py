"""The optimizer, and the learning rate as a pure function of the step."""

import math

import torch
from torch import Tensor, nn

from lora_algos.adapted_model import AdaptedModel
from training.config import OptimConfig, TrainConfig
from training.optim.arguments import optimizer_arguments, optimizer_class


def parameter_groups(adapted: AdaptedModel, config: TrainConfig) -> list[dict]:
    """Group the trained parameters by the factor on their learning rate, which each group has as
    `lr_scale`."""
    parameters = adapted.named_parameters()
    scales = adapted.learning_rate_scales(config.adapter.loraplus_lr_ratio)
    text_lr = config.optim.text_encoder_learning_rate or config.learning_rate
    text_scale = text_lr / config.learning_rate
    members: dict[float, list[nn.Parameter]] = {}
    for name, scale in scales.items():
        if name.startswith("text_encoder"):
            scale *= text_scale
        group = members.setdefault(scale, [])
        group.append(parameters[name])
    groups = []
    for scale, group_parameters in members.items():
        group_options = {
            "params": group_parameters,
            "lr_scale": scale,
        }
        groups.append(group_options)
    return groups


def build_optimizer(adapted: AdaptedModel, config: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimizer of the config. WHEN: `optimizer_errors` returned none."""
    class_ = optimizer_class(config.optimizer)
    arguments, _ = optimizer_arguments(config)
    optimizer: torch.optim.Optimizer = class_(
        parameter_groups(adapted, config),
        lr=config.learning_rate,
        **arguments,
    )
    return optimizer


def learning_rate(step: int, peak: float, steps: int, config: OptimConfig) -> float:
    """Return the learning rate of update number `step`, counted from 0, of `steps` updates."""
    warmup_steps = config.lr_warmup_steps
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if config.lr_scheduler == "constant":
        return peak
    scheduled_steps = max(1, steps - warmup_steps)
    progress = (step - warmup_steps) / scheduled_steps
    if config.lr_scheduler == "linear":
        return peak * (1 - progress)
    angle = math.pi * progress
    return peak * 0.5 * (1 + math.cos(angle))


def batch_size_scale(config: OptimConfig, total_batch_size: int) -> float:
    """Return the factor on the learning rate for the number of samples in a step."""
    if config.scale_lr == "linear":
        return float(total_batch_size)
    if config.scale_lr == "sqrt":
        return math.sqrt(total_batch_size)
    return 1.0


def scheduled_learning_rate(config: TrainConfig, step: int, micro_batches_per_step: int) -> float:
    """Return the learning rate of update number `step`, counted from 0, of a run."""
    total_batch_size = config.batch_size * micro_batches_per_step
    scale = batch_size_scale(config.optim, total_batch_size)
    return learning_rate(
        step,
        peak=config.learning_rate * scale,
        steps=config.steps,
        config=config.optim,
    )


class SkipNonFinite:
    """Optimizer steps that change nothing if the gradient is not finite.

    torch's fused optimizers read a flag on the device, as they do with a GradScaler. For other
    optimizers the gradient norm is read from the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        reads_flag = getattr(optimizer, "_step_supports_amp_scaling", False)
        # SGD's momentum would stay uninitialized memory if the first step were skipped by the flag
        self.uses_flag = bool(reads_flag and not optimizer.defaults.get("momentum"))

    def step(self, norm: Tensor) -> None:
        """Take a step. `norm`: norm of the gradient before clipping."""
        if self.uses_flag:
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bool(norm.isfinite()):
            self.optimizer.step()
