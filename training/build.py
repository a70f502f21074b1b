"""Builds the denoiser with its adapters as a config asks for it, and says what came out."""

from collections import Counter
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from adapter_files import files
from common.errors import AdapterError, ConfigError, error_list
from lora_algos.attach import Adapted, Plan, attach, attach_from_file
from models import get_family
from models.base import ModelFamily
from objectives.objective import Objective
from training import gradient_checkpointing
from training.checkpoints.best import validation_faults
from training.config import TrainConfig
from training.distributed.engine import Engine
from training.metadata import Parts, total_steps_of
from training.optim.arguments import optimizer_faults
from training.optim.schedule import build_optimizer

TEXT = ("lora_te", "text_encoder")  # how the keys of text encoders begin
BASE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "none": None}


def check(config: TrainConfig) -> None:
    """WHEN: before anything is encoded or loaded. Raises ConfigError with all that is wrong with the optimizer and with
    what is asked of validation."""
    if faults := [*optimizer_faults(config), *validation_faults(config)]:
        raise ConfigError(error_list("cannot train", faults))


def family_of(config: TrainConfig) -> ModelFamily:
    """The family of the base. ConfigError or ModelError, before anything is encoded, for options that do not fit."""
    check(config)
    family = get_family(config.model)
    Objective(family.process(config.objective), config.objective)
    return family


def load_denoiser(config: TrainConfig, family: ModelFamily, contiguous: bool = False) -> tuple[nn.Module, torch.dtype]:
    """The base model in training form and the dtype of its weights, which its inputs must have too."""
    denoiser = family.load_denoiser(BASE_DTYPES[config.training_dtype])
    dtype = main_dtype(denoiser)
    if config.gradient_checkpointing:
        gradient_checkpointing.apply(denoiser, config.checkpoint_depth, config.checkpoint_policy)
    if not contiguous:
        # convolutions read channels-last weights without reordering them, on GPUs with tensor cores and on CPUs
        for layer in denoiser.modules():
            if isinstance(layer, nn.Conv2d):
                layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return denoiser.train(), dtype


def main_dtype(denoiser: nn.Module) -> torch.dtype:
    """What most of its weights have: some models keep a few in fp32."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in denoiser.parameters():
        counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0]


def attach_adapters(
    config: TrainConfig, family: ModelFamily, denoiser: nn.Module, names: files.Names
) -> tuple[Adapted, int]:
    """New adapters, or those of `existing_lora`, and the steps that the latter were trained for."""
    plan = Plan(config.adapter, config.algorithm, config.rank, config.bypass_mode)
    if config.existing_lora is not None:
        tensors, metadata = files.read(config.existing_lora)
        layers, unknown = files.from_file(tensors, metadata, denoiser, names)
        if any(key.startswith(TEXT) for key in tensors) and not names.text:
            unknown.insert(0, "it has layers of text encoders, which --model.train_text_encoder goes on with")
        adapted = attach_from_file(denoiser, layers, unknown, plan, family.targets)
        steps = total_steps_of(config.existing_lora, metadata)
    else:
        adapted, steps = attach(denoiser, plan.specs(denoiser, family.targets), config.seed), 0
    if names.text and not any(name in names.text for name in adapted.layers()):
        raise AdapterError(
            "--model.train_text_encoder, but no layer of a text encoder is adapted: the file of --existing_lora has "
            "none, or no pattern of --adapter.targets matches one"
        )
    for name in family.idle_layers(denoiser):
        denoiser.get_submodule(name).requires_grad_(False)
    if not adapted.named_parameters():
        raise AdapterError("--adapter.targets: no prediction depends on the layers that it names. Name others")
    return adapted, steps


def build_engine(config: TrainConfig, accelerator: Accelerator, denoiser: nn.Module, adapted: Adapted) -> Engine:
    """What Accelerate's config asks for, with the optimizer."""
    optimizer = build_optimizer(adapted, config)
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        from training.distributed.deepspeed import ZeroEngine

        return ZeroEngine(config, accelerator, denoiser, adapted, optimizer)
    return Engine(config, accelerator, denoiser, adapted, optimizer)


def on_one_process(config: TrainConfig, parts: Parts) -> Parts:
    """`parts` with the adapters on a copy of the base of their own, on the CPU: of a sharded base each rank has a part,
    and what some files hold is reckoned from the whole."""
    denoiser, _ = load_denoiser(config, parts.family)
    adapted, _ = attach_adapters(config, parts.family, denoiser, parts.names)
    adapted.load_state_dict(parts.adapted.state_dict())
    return replace(parts, adapted=adapted)
