"""`export-dataset`: writes the encoded data of a run into a separate folder."""

from pathlib import Path

from common.errors import ConfigError
from common.process import ProcessInfo
from data.export import write_dataset
from data.precompute.build import DatasetBuilder
from models.detect import get_family
from tools.data.options import ExportOptions
from training.build import extra_prompts
from training.distributed.accelerator import build_accelerator


def run(options: ExportOptions) -> int:
    """Encode missing data, on all processes, and write the folder on the main process.

    Return the exit code."""
    config = options.config
    out = Path(options.out)
    accelerator = build_accelerator(config)
    family = get_family(config.model)
    if family.paints_masks and options.form != "encoded":
        raise ConfigError(
            f"--form {options.form}: has no place for masks, which {family.name} needs. Use --form encoded"
        )
    process = ProcessInfo.of(accelerator)
    prompts = extra_prompts(config, family)
    with DatasetBuilder.opened(config.data, family, process) as builder:
        builder.extra_prompts = prompts
        plan = builder.plan(not config.bucket_mode)
        datasets = builder.encode(plan)

        def write() -> int:
            return write_dataset(builder, datasets, out, options.form)

        count = builder.stages.run_on_main(write)
    accelerator.print(f"wrote {count} samples to {out}")
    has_variants = datasets.has_caption_variants or config.data.random_flip
    if options.form != "encoded" and has_variants:
        accelerator.print(
            f"note: the form {options.form} has each image once, not mirrored, with its first "
            "caption"
        )
    return 0
