"""The optimizer, and the learning rate as a pure function of the step."""

import math

import torch
from torch import Tensor, nn

from lora_algos.attach import Adapted
from training.config import OptimConfig, TrainConfig
from training.optim.arguments import arguments, optimizer_class


def parameter_groups(adapted: Adapted, config: TrainConfig) -> list[dict]:
    """The trained parameters by the factor on their learning rate, which each group has as `lr_scale`."""
    parameters = adapted.named_parameters()
    groups: dict[float, list[nn.Parameter]] = {}
    text_rate = config.optim.text_encoder_learning_rate or config.learning_rate
    for name, scale in adapted.learning_rate_scales(config.adapter.lora_plus_ratio).items():
        scale *= text_rate / config.learning_rate if name.startswith("text_encoder") else 1.0
        groups.setdefault(scale, []).append(parameters[name])
    return [{"params": members, "lr_scale": scale} for scale, members in groups.items()]


def build_optimizer(adapted: Adapted, config: TrainConfig) -> torch.optim.Optimizer:
    """The one that the config names, as its options say. WHEN: `optimizer_faults` found none."""
    values, _ = arguments(config)
    parameters = parameter_groups(adapted, config)
    return optimizer_class(config.optimizer_name)(parameters, lr=config.learning_rate, **values)


def learning_rate(step: int, peak: float, steps: int, config: OptimConfig) -> float:
    """The learning rate of update number `step` (from 0) of `steps`."""
    if step < config.warmup_steps:
        return peak * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.lr_schedule == "linear":
        return peak * (1 - progress)
    if config.lr_schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak


def batch_scale(config: OptimConfig, total_batch_size: int) -> float:
    """What the learning rate is multiplied by for the size of a step."""
    scales = {"none": 1.0, "linear": float(total_batch_size), "sqrt": math.sqrt(total_batch_size)}
    return scales[config.lr_scale_with_batch]


class SkipNonFinite:
    """Steps of an optimizer that change nothing where the gradient is not finite.

    torch's fused optimizers take that from the device, as they do from a GradScaler. For others the norm is read.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        # but for SGD's momentum, which a first step that is skipped leaves as the memory happens to be
        amp, momentum = getattr(optimizer, "_step_supports_amp_scaling", False), optimizer.defaults.get("momentum")
        self.unread = bool(amp and not momentum)

    def step(self, norm: Tensor) -> None:
        """`norm`: of the gradient, before clipping."""
        if self.unread:
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bool(norm.isfinite()):
            self.optimizer.step()
