"""`export-dataset`: the encoded data of a run as a folder of its own."""

from pathlib import Path

from common.process import ProcessInfo
from data.export import write_dataset
from data.precompute.build import DatasetBuilder
from models import get_family
from tools.data.options import ExportOptions
from training.distributed.accelerator import build_accelerator


def run(options: ExportOptions) -> int:
    """Encodes what is missing, on all ranks, and writes the folder on the main one. Returns the
    exit code."""
    config, out = options.config, Path(options.out)
    accelerator, family = build_accelerator(config), get_family(config.model)
    process = ProcessInfo.of(accelerator)
    with DatasetBuilder.opened(config.data, family, process) as build:
        built = build.run(not config.bucket_mode)
        count = build.stages.run_on_main(lambda: write_dataset(build, built, out, options.form))
    accelerator.print(f"wrote {count} samples to {out}")
    if options.form != "encoded" and (built.has_caption_variants or config.data.random_flip):
        accelerator.print(
            "note: each image once, not mirrored, with its first caption; that is all this form has"
        )
    return 0
