"""The summary that a run prints before it trains: what is trained, and each derived number as an
equation."""

from collections import Counter
from importlib.metadata import version

import torch

from common.errors import counted
from common.process import ProcessInfo
from data.dataset import LatentDataset
from data.precompute.build import Datasets
from models.blocks import inner_blocks
from models.quantized_weight import QuantizedWeight
from objectives.config import SliderConfig
from training.assistant import AssistedLayer
from training.block_classes import outermost
from training.block_offload import offloaded_blocks
from training.components import RunComponents
from training.config import TrainConfig
from training.gradient_checkpointing import Checkpointed
from training.loss import LossFunction
from training.memory.config import GIB
from training.optim.registry import OTHER_OPTIMIZERS
from training.optim.schedule import batch_size_scale
from training.run_folder import REPORT

MAX_BUCKETS = 12


def bucket_lines(dataset: LatentDataset, batch_size: int) -> list[str]:
    """Return a line with the image sizes and the samples per epoch of each, if there are several
    sizes."""
    buckets = []
    for bucket in dataset.buckets:
        row = bucket[0].first
        num_samples = sum(segment.visits for segment in bucket)
        facts = (dataset.size(row), dataset.latent_frames(row), dataset.control_sizes(row))
        buckets.append((num_samples, *facts))
    if len(buckets) < 2:
        return []
    buckets.sort(reverse=True)
    entries = []
    for num_samples, (height, width), frames, controls in buckets[:MAX_BUCKETS]:
        suffix = f" of {frames} latent frames" if frames > 1 else ""
        if controls:
            sizes = " and ".join(f"{side}x{other_side}" for other_side, side in controls)
            suffix += f" with {sizes} latents of control images"
        entries.append(f"{width}x{height}{suffix}: {num_samples}")
    line = ", ".join(entries)
    num_hidden = len(buckets) - len(entries)
    if num_hidden:
        line += f" and {num_hidden} more"
    small_buckets = [bucket for bucket in buckets if bucket[0] < batch_size]
    if small_buckets:
        line += (
            f"; {len(small_buckets)} of them fill a batch of {batch_size} only over several epochs"
        )
    return [f"buckets     {line}"]


def learning_rate_lines(config: TrainConfig, total_batch_size: int) -> list[str]:
    """Return a line with the learning rate, if it is scaled with the batch size."""
    if config.optim.scale_lr == "none":
        return []
    scale = batch_size_scale(config.optim, total_batch_size)
    factor = "samples per step"
    if config.optim.scale_lr == "sqrt":
        factor = f"square root of {factor}"
    return [
        f"rate        learning_rate x {factor} = {config.learning_rate:g} x {scale:g} = "
        f"{config.learning_rate * scale:g}"
    ]


def optimizer_lines(config: TrainConfig) -> list[str]:
    """Return lines about an optimizer that is not one of the node's, and about an EMA."""
    name = config.optimizer
    lines = []
    entry = OTHER_OPTIMIZERS.get(name)
    if entry is not None:
        arguments = "".join(f", {pair}" for pair in config.optim.args)
        lines.append(f"optimizer   {name} of {entry.package} {version(entry.package)}{arguments}")
        if entry.needs_single_lr and config.learning_rate != 1:
            lines.append(
                f"note        {name} adapts its learning rate, and --learning_rate is a factor on it. "
                f"The usual factor is 1, not {config.learning_rate:g}"
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
    divisors = []
    for number in range(1, micro_batches_per_step + 1):
        if micro_batches_per_step % number == 0:
            divisors.append(str(number))
    *first, last = divisors
    return [
        f"processes   {', '.join(first)} or {last} can resume this run with the same command: they "
        f"share its {micro_batches_per_step} micro-batches per step"
    ]


def adapter_lines(components: RunComponents) -> list[str]:
    """Return a line for each adapter setting, with its number of layers."""
    layers = components.adapted.layers()
    counts = Counter(layer.describe() for layer in layers.values())
    lines = []
    for description, count in counts.items():
        lines.append(f"adapter     {count} layers: {description}")
    return lines


def assistant_lines(components: RunComponents) -> list[str]:
    """Return a line about the assistant LoRA."""
    config = components.config
    if config.model.assistant_lora is None:
        return []
    modules = components.adapted.model.modules()
    num_layers = sum(isinstance(module, AssistedLayer) for module in modules)
    return [
        f"assistant   {config.model.assistant_lora}: {num_layers} layers, frozen and not exported; "
        f"strength 1 in training, {config.sample.assistant_strength:g} in samples"
    ]


def parameter_line(components: RunComponents) -> str:
    adapted = components.adapted
    trained = adapted.named_parameters().values()
    num_trained = sum(parameter.numel() for parameter in trained)
    num_parameters = sum(parameter.numel() for parameter in adapted.model.parameters())
    percent = 100 * num_trained / num_parameters
    return f"trainable   {num_trained:,} of {num_parameters:,} parameters = {percent:.2f} %"


def checkpointing_lines(components: RunComponents) -> list[str]:
    """Return a line about the blocks that are recomputed."""
    config, denoiser = components.config, components.adapted.model
    if not config.gradient_checkpointing:
        return []
    blocks = outermost(components.family.blocks(denoiser, config.checkpoint_depth))
    num_recomputed = sum(isinstance(block, Checkpointed) for block in blocks.values())
    lines = [f"blocks      {num_recomputed} of {len(blocks)} are recomputed in the backward pass"]
    offloaded = offloaded_blocks(denoiser)
    num_inner_blocks = len(inner_blocks(blocks))
    if offloaded:
        buffers = [block.host_weights.buffer for block in offloaded]
        num_bytes = sum(buffer.nbytes for buffer in buffers)
        lines.append(
            f"offload     {len(offloaded)} of {num_inner_blocks} blocks between input and output: "
            f"{num_bytes / GIB:.2g} GiB in CPU memory; each is copied when it computes"
        )
        if any(block.host_weights.lacks_pinned_memory for block in offloaded):
            lines.append(
                "note        the system gives too little pinned memory (ulimit -l), so copies are slow"
            )
    return lines


def step_lines(
    components: RunComponents, micro_batches_per_step: int, num_processes: int
) -> list[str]:
    """Return lines about samples per step and epochs."""
    config = components.config
    grad_accumulation_steps = micro_batches_per_step // num_processes
    total_batch_size = config.batch_size * micro_batches_per_step
    num_samples = config.steps * total_batch_size
    epoch_size = components.datasets.train.epoch_size
    num_epochs = num_samples / epoch_size
    run_line = f"run         {config.steps} steps x {total_batch_size} = {num_samples} samples"
    if not config.objective.slider.needs_no_images:
        run_line += f" = {num_samples} / {epoch_size} = {num_epochs:.1f} epochs"
    return [
        f"step        batch_size x grad_accumulation_steps x processes = {config.batch_size} x "
        f"{grad_accumulation_steps} x {num_processes} = {total_batch_size} samples per step",
        *process_lines(micro_batches_per_step),
        *learning_rate_lines(config, total_batch_size),
        *optimizer_lines(config),
        run_line,
    ]


def model_lines(
    components: RunComponents, loss_function: LossFunction, device: torch.device
) -> list[str]:
    """Return lines about the base model and the objective."""
    config = components.config
    dtype = str(loss_function.dtype).removeprefix("torch.")
    if components.family.block_storage is not None:
        dtype += f", those of blocks stored in {', '.join(block_formats(components))}"
    return [
        f"model       {config.model.path} ({components.family.name}), base weights {dtype}, on {device}",
        f"objective   {loss_function.objective.process.describe()}",
        *slider_lines(config.objective.slider),
    ]


def slider_lines(slider: SliderConfig) -> list[str]:
    """Return a line about a slider, and how many passes through the model it takes."""
    if not slider.targets:
        return []
    directions = "strengths 1 and -1" if slider.both_directions else "strength 1"
    line = f"slider      {counted(len(slider.targets), 'target')}, scale {slider.scale:g}, {directions}"
    num_passes = 3  # of the base
    if slider.start_from == "noise":
        num_steps = slider.denoising_steps
        num_passes += num_steps
        line += f", {counted(num_steps, 'step')} from noise"
    if slider.uses_guidance:
        num_passes += slider.denoising_steps
        line += f" with guidance {slider.guidance:g}"
    return [f"{line}: {num_passes} forward passes more than usual"]


def data_lines(config: TrainConfig, datasets: Datasets, takes_controls: bool = False) -> list[str]:
    """Return lines about the samples. They are printed before the base model is loaded.

    `takes_controls`: the model takes control images."""
    if config.objective.slider.needs_no_images:
        return [
            f"images      none are needed; encoded now: {counted(datasets.encoded_captions, 'prompt')}"
        ]
    num_validation = 0
    if datasets.validation is not None:
        num_validation = len(datasets.validation)
    return [
        f"images      {len(datasets.train)} for training, {num_validation} for validation; encoded "
        f"now: {datasets.encoded_images} images, {datasets.encoded_captions} captions",
        *control_lines(datasets.train, takes_controls),
        *bucket_lines(datasets.train, config.batch_size),
    ]


def control_lines(dataset: LatentDataset, takes_controls: bool) -> list[str]:
    """Return a line about control images, if the model takes them.

    All samples of a bucket have equally many, of the same sizes."""
    if not takes_controls:
        return []
    images_by_count: Counter[int] = Counter()
    buckets_by_count: Counter[int] = Counter()
    for bucket in dataset.buckets:
        count = dataset.num_controls(bucket[0].first)
        buckets_by_count[count] += 1
        images_by_count[count] += sum(segment.count for segment in bucket)
    parts = []
    for count, num_images in sorted(images_by_count.items()):
        controls = counted(count, "control image") if count else "no control image"
        buckets = counted(buckets_by_count[count], "bucket")
        parts.append(f"{num_images} with {controls}, in {buckets}")
    return [f"controls    {'; '.join(parts)}"]


def sample_lines(components: RunComponents, start_step: int) -> list[str]:
    """Return lines about samples that are drawn, and about what they cost.

    `start_step`: the step from which this process trains."""
    config, samples = components.config, components.samples
    if samples is None:
        return []
    passes = sum(prompt.num_inference_steps or 0 for prompt in samples.prompts)
    prompts = counted(len(samples.prompts), "prompt")
    lines = []
    if config.sample.every:
        first = start_step or -config.sample.at_start
        times = num_multiples(first, config.steps, config.sample.every)
        lines.append(
            f"samples     {prompts} every {config.sample.every} steps, "
            f"{counted(passes, 'denoising step')} each time, {counted(times, 'time')} in this run"
        )
    if config.sample.grid:
        num_steps = min(config.sample.grid, config.steps // config.export.every)
        num_strengths = len(config.sample.grid_strengths)
        num_passes = passes * num_steps * num_strengths
        lines.append(
            f"grid        {prompts} x up to {counted(num_steps, 'exported step')} x "
            f"{counted(num_strengths, 'strength')} at the end, "
            f"{counted(num_passes, 'denoising step')}"
        )
    return lines


def num_multiples(start: int, end: int, interval: int) -> int:
    """Return how many steps after `start` are multiples of an interval, or the last one.

    A negative start counts step 0 too."""
    steps = {step for step in range(0, end + 1, interval) if step > start}
    if start < end:
        steps.add(end)
    if start == 0:
        steps.discard(0)
    return len(steps)


def block_formats(components: RunComponents) -> list[str]:
    """Return the formats of quantized weights, by name."""
    names = set()
    for parameter in components.adapted.model.parameters():
        if isinstance(parameter.data, QuantizedWeight):
            names.add(parameter.data.format.name)
    return sorted(names)


def end_lines(components: RunComponents) -> list[str]:
    """Return lines about an existing adapter and the output folder."""
    config = components.config
    lines = []
    if config.existing_lora is not None:
        num_layers = len(components.adapted.layers())
        lines.append(
            f"existing    {config.existing_lora}: {num_layers} layers, every tensor matched; the "
            "file decides the layers and their algorithm, rank and alpha, not the options"
        )
    if components.previous_steps:
        total_steps = components.previous_steps + config.steps
        lines.append(
            f"continued   {components.previous_steps} earlier + {config.steps} = {total_steps} "
            "steps in total"
        )
    return [*lines, f"output      {config.output_dir}; its {REPORT} shows the run while it trains"]


def summary(
    components: RunComponents,
    loss_function: LossFunction,
    process: ProcessInfo,
    micro_batches_per_step: int,
    start_step: int = 0,
) -> str:
    """Return the summary of a run, without the lines about its data.

    `start_step`: the step from which this process trains."""
    lines = [
        *model_lines(components, loss_function, process.device),
        *adapter_lines(components),
        *assistant_lines(components),
        parameter_line(components),
        *checkpointing_lines(components),
        *step_lines(components, micro_batches_per_step, process.count),
        *sample_lines(components, start_step),
        *end_lines(components),
    ]
    return "\n".join(lines)
