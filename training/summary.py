"""The summary that a run prints before it trains: what is trained, and each derived number as an
equation."""

from collections import Counter
from importlib.metadata import version

import torch

from common.process import ProcessInfo
from data.dataset import LatentDataset
from training.config import TrainConfig
from training.loss import LossFunction
from training.optim.registry import OTHER_OPTIMIZERS
from training.optim.schedule import batch_size_scale
from training.parts import RunParts

MAX_BUCKETS = 12


def bucket_lines(dataset: LatentDataset, batch_size: int) -> list[str]:
    """Return a line with the image sizes and the samples per epoch of each, if there are several
    sizes."""
    buckets = []
    for bucket in dataset.buckets:
        row = bucket[0].first
        num_samples = sum(segment.visits for segment in bucket)
        buckets.append((num_samples, dataset.size(row), dataset.latent_frames(row)))
    if len(buckets) < 2:
        return []
    buckets.sort(reverse=True)
    entries = []
    for num_samples, (height, width), frames in buckets[:MAX_BUCKETS]:
        suffix = f" of {frames} latent frames" if frames > 1 else ""
        entries.append(f"{width}x{height}{suffix}: {num_samples}")
    line = ", ".join(entries)
    if len(buckets) > MAX_BUCKETS:
        line += f" and {len(buckets) - MAX_BUCKETS} more"
    num_small = sum(num_samples < batch_size for num_samples, _, _ in buckets)
    if num_small:
        line += f"; {num_small} of them fill a batch of {batch_size} only over several epochs"
    return [f"buckets     {line}"]


def learning_rate_lines(config: TrainConfig, total_batch_size: int) -> list[str]:
    """Return a line with the learning rate, if it is scaled with the batch size."""
    if config.optim.scale_lr == "none":
        return []
    scale = batch_size_scale(config.optim, total_batch_size)
    prefix = "square root of " if config.optim.scale_lr == "sqrt" else ""
    return [
        f"rate        learning_rate x {prefix}samples per step = {config.learning_rate:g} x {scale:g} = "
        f"{config.learning_rate * scale:g}"
    ]


def optimizer_lines(config: TrainConfig) -> list[str]:
    """Return lines about an optimizer that is not one of the node's, and about an EMA."""
    name, lines = config.optimizer, []
    entry = OTHER_OPTIMIZERS.get(name)
    if entry is not None:
        arguments = "".join(f", {pair}" for pair in config.optim.args)
        lines.append(f"optimizer   {name} of {entry.package} {version(entry.package)}{arguments}")
        if entry.needs_single_lr and config.learning_rate != 1:
            lines.append(
                f"note        {name} finds the learning rate by itself, and learning_rate is a factor on it. "
                f"It is made for 1, not {config.learning_rate:g}"
            )
    if config.ema.decay:
        lines.append(
            f"average     EMA of decay {config.ema.decay:g}; validation, samples and export use: "
            f"{config.ema.evaluate_with}"
        )
    return lines


def process_lines(micro_batches_per_step: int) -> list[str]:
    """Return a line with the numbers of processes that can resume the run."""
    if micro_batches_per_step == 1:
        return []
    divisors = [n for n in range(1, micro_batches_per_step + 1) if micro_batches_per_step % n == 0]
    *first, last = map(str, divisors)
    return [
        f"processes   {', '.join(first)} or {last} can resume this run with the same command: they share its "
        f"{micro_batches_per_step} micro-batches per step"
    ]


def adapter_lines(parts: RunParts) -> list[str]:
    """Return a line for each kind of adapter."""
    counts = Counter(layer.describe() for layer in parts.adapted.layers().values())
    return [f"adapter     {count} layers: {description}" for description, count in counts.items()]


def parameter_line(parts: RunParts) -> str:
    num_trained = sum(parameter.numel() for parameter in parts.adapted.named_parameters().values())
    num_parameters = sum(parameter.numel() for parameter in parts.adapted.model.parameters())
    percent = 100 * num_trained / num_parameters
    return f"trainable   {num_trained:,} of {num_parameters:,} parameters = {percent:.2f} %"


def step_lines(
    config: TrainConfig, dataset: LatentDataset, micro_batches_per_step: int, num_processes: int
) -> list[str]:
    """Return lines about samples per step and epochs."""
    total_batch_size = config.batch_size * micro_batches_per_step
    num_samples, epoch_size = config.steps * total_batch_size, dataset.epoch_size
    return [
        f"step        batch_size x grad_accumulation_steps x processes = {config.batch_size} x "
        f"{micro_batches_per_step // num_processes} x {num_processes} = {total_batch_size} samples per step",
        *process_lines(micro_batches_per_step),
        *learning_rate_lines(config, total_batch_size),
        *optimizer_lines(config),
        f"run         {config.steps} steps x {total_batch_size} = {num_samples} samples = {num_samples} / "
        f"{epoch_size} = {num_samples / epoch_size:.1f} epochs",
    ]


def model_lines(
    config: TrainConfig, parts: RunParts, loss_function: LossFunction, device: torch.device
) -> list[str]:
    """Return lines about the base model, the objective and the data."""
    datasets = parts.datasets
    num_validation = len(datasets.validation) if datasets.validation else 0
    dtype = str(loss_function.dtype).removeprefix("torch.")
    return [
        f"model       {config.model.path} ({parts.family.name}), base weights {dtype}, on {device}",
        f"objective   {loss_function.objective.process.describe()}",
        f"images      {len(datasets.train)} for training, {num_validation} for validation; encoded now: "
        f"{datasets.encoded_images} images, {datasets.encoded_captions} captions",
        *bucket_lines(datasets.train, config.batch_size),
    ]


def end_lines(config: TrainConfig, parts: RunParts) -> list[str]:
    """Return lines about an existing adapter and the output folder."""
    lines = []
    if config.existing_lora is not None:
        num_layers = len(parts.adapted.layers())
        lines.append(
            f"existing    {config.existing_lora}: {num_layers} layers, every tensor matched"
        )
    if parts.previous_steps:
        total_steps = parts.previous_steps + config.steps
        lines.append(
            f"continued   {parts.previous_steps} earlier + {config.steps} = {total_steps} steps in total"
        )
    return [*lines, f"output      {config.output_dir}"]


def summary(
    config: TrainConfig,
    parts: RunParts,
    loss_function: LossFunction,
    process: ProcessInfo,
    micro_batches_per_step: int,
) -> str:
    """Return the summary of a run."""
    lines = [
        *model_lines(config, parts, loss_function, process.device),
        *adapter_lines(parts),
        parameter_line(parts),
        *step_lines(config, parts.datasets.train, micro_batches_per_step, process.count),
        *end_lines(config, parts),
    ]
    return "\n".join(lines)
