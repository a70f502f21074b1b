"""The summary that a run prints before it trains."""

from importlib.metadata import version

from data.dataset import LatentDataset
from training.config import TrainConfig
from training.optim.registry import OPTIMIZERS
from training.optim.schedule import batch_scale
from training.trainer import Run

MOST_BUCKETS = 12  # in one line


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
