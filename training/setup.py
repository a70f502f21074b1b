"""Builds the denoiser with its adapters as a config asks for it, and says what came out."""

from collections import Counter
from dataclasses import replace
from importlib.metadata import version

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from adapter_files import files
from common.errors import AdapterError, ConfigError, error_list
from data.dataset import LatentDataset
from lora_algos.attach import Adapted, Plan, attach, attach_from_file
from models import get_family
from models.base import ModelFamily
from objectives.objective import Objective
from training import checkpointing
from training.best import validation_faults
from training.config import TrainConfig
from training.engine import Engine
from training.metadata import Parts, total_steps_of
from training.optim import batch_scale, build_optimizer
from training.optim_args import optimizer_faults
from training.optimizers import OPTIMIZERS
from training.run import Run

MOST_BUCKETS = 12  # in one line
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
        checkpointing.apply(denoiser, config.checkpoint_depth, config.checkpoint_policy)
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
        from training.zero import ZeroEngine

        return ZeroEngine(config, accelerator, denoiser, adapted, optimizer)
    return Engine(config, accelerator, denoiser, adapted, optimizer)


def on_one_process(config: TrainConfig, parts: Parts) -> Parts:
    """`parts` with the adapters on a copy of the base of their own, on the CPU: of a sharded base each rank has a part,
    and what some files hold is reckoned from the whole."""
    denoiser, _ = load_denoiser(config, parts.family)
    adapted, _ = attach_adapters(config, parts.family, denoiser, parts.names)
    adapted.load_state_dict(parts.adapted.state_dict())
    return replace(parts, adapted=adapted)


def bucket_lines(dataset: LatentDataset, batch_size: int) -> list[str]:
    """The sizes of the images, if they are not all alike, and how many of each are seen per epoch."""
    firsts = [(sum(segment.visits for segment in bucket), bucket[0].first) for bucket in dataset.buckets]
    buckets = sorted(((n, dataset.size(row), dataset.latent_frames(row)) for n, row in firsts), reverse=True)
    if len(buckets) < 2:
        return []
    named = [
        f"{width}x{height}{f' of {frames} latent frames' * (frames > 1)}: {visits}"
        for visits, (height, width), frames in buckets[:MOST_BUCKETS]
    ]
    more = f" and {len(buckets) - MOST_BUCKETS} more" if len(buckets) > MOST_BUCKETS else ""
    small = sum(visits < batch_size for visits, _, _ in buckets)
    late = f"; {small} of them fill a batch of {batch_size} only over several epochs" if small else ""
    return [f"buckets     {', '.join(named)}{more}{late}"]


def rate_lines(run: Run) -> list[str]:
    """The learning rate where it is not the one that was given."""
    config, how = run.config, run.config.optim.lr_scale_with_batch
    if how == "none":
        return []
    scale = batch_scale(config.optim, run.total_batch_size)
    root = "square root of " if how == "sqrt" else ""
    return [f"rate        learning_rate x {root}samples per step = {config.learning_rate:g} x {scale:g} = "
            f"{config.learning_rate * scale:g}"]  # fmt: skip


def optimizer_lines(config: TrainConfig) -> list[str]:
    """The optimizer where it is not one of the node's, and the average of the weights if there is one."""
    lines, name, rate = [], config.optimizer_name, config.learning_rate
    source = OPTIMIZERS[name]
    if config.optim.name is not None:
        told = "".join(f", {pair}" for pair in config.optim.args)
        lines.append(f"optimizer   {name} of {source.package} {version(source.package)}{told}")
    if source.one_rate and rate != 1:
        lines.append(f"note        {name} finds the learning rate by itself, and learning_rate is a factor on it: "
                     f"1 is what it is made for, not {rate:g}")  # fmt: skip
    if config.ema.decay:
        lines.append(f"average     EMA of decay {config.ema.decay:g}; validated, drawn and exported: {config.ema.use}")
    return lines


def process_lines(run: Run) -> list[str]:
    """On which numbers of processes the run can go on."""
    per_step = run.micro_batches_per_step
    if per_step == 1:
        return []
    counts = [str(n) for n in range(1, per_step + 1) if per_step % n == 0]
    return [f"processes   {', '.join(counts[:-1])} or {counts[-1]} can go on with this run by the same command: "
            f"its {per_step} micro-batches per step are shared among them"]  # fmt: skip


def summary(run: Run) -> str:
    """What is about to happen, each derived number as an equation."""
    config, parts, accelerator = run.config, run.parts, run.accelerator
    trained = sum(p.numel() for p in run.engine.trained)
    total = sum(p.numel() for p in parts.adapted.model.parameters())
    train, held_out = parts.datasets.train, parts.datasets.validation
    samples, epoch = config.steps * run.total_batch_size, train.epoch_size
    groups: dict[str, int] = {}
    for layer in parts.adapted.layers().values():
        groups[layer.describe()] = groups.get(layer.describe(), 0) + 1
    lines = [
        f"model       {config.model.path} ({parts.family.name}), "
        f"base weights {str(run.loss_function.dtype).removeprefix('torch.')}, on {accelerator.device}",
        f"objective   {run.loss_function.objective.process.describe()}",
        f"images      {len(train)} to train on, {len(held_out) if held_out else 0} held out; encoded now: "
        f"{parts.datasets.encoded_images} images, {parts.datasets.encoded_captions} captions",
        *bucket_lines(train, config.batch_size),
        *(f"adapter     {count} layers: {what}" for what, count in groups.items()),
        f"trainable   {trained:,} of {total:,} parameters = {100 * trained / total:.2f} %",
        f"step        batch_size x grad_accumulation_steps x processes = {config.batch_size} x "
        f"{run.accumulation} x {accelerator.num_processes} = {run.total_batch_size} samples per step",
        *process_lines(run),
        *rate_lines(run),
        *optimizer_lines(config),
        f"run         {config.steps} steps x {run.total_batch_size} = {samples} samples = {samples} / {epoch} = "
        f"{samples / epoch:.1f} epochs",
    ]
    if config.existing_lora is not None:
        lines.append(
            f"existing    {config.existing_lora}: every tensor matched, of {len(parts.adapted.layers())} layers"
        )
    if parts.previous_steps:
        lines.append(f"continued   {parts.previous_steps} earlier + {config.steps} = "
                     f"{parts.previous_steps + config.steps} steps in all")  # fmt: skip
    return "\n".join([*lines, f"output      {config.output_dir}"])
