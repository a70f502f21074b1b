"""`data`: prints the data of a run before anything is encoded, and draws contact sheets of it."""

import shutil
import sys
from pathlib import Path

from common.process import ProcessInfo
from data.config import DataConfig, SourceConfig
from data.plan_samples import PlanSamples
from data.precompute.build import DataPlan, DatasetBuilder
from data.sources import detect_kind
from models.base import ModelFamily
from models.detect import get_family
from tools.data.contact_sheets import draw_sheets
from tools.data.counts import NameList
from tools.data.encoding import Amount, conditioning_amount, latents_amount
from tools.data.options import DataOptions
from tools.data.survey import Survey, find_copies
from tools.tables import Fact, align_columns, list_facts
from training.build import extra_prompts
from training.config import TrainConfig
from training.distributed.accelerator import build_accelerator

INDENT = "  "
SOURCE_COLUMNS = [
    "path",
    "kind",
    "used for",
    "images",
    "held out",
    "captions",
    "repeats",
    "weight",
    "visits per epoch",
]
BUCKET_COLUMNS = [
    "width x height",
    "images",
    "held out",
    "visits per epoch",
    "micro-batches per epoch",
    "cropped away",
    "at most",
]


def run(options: DataOptions) -> int:
    """Print the report, then draw the sheets; return the exit code: 1 if a sheet is incomplete."""
    if hasattr(sys.stdout, "reconfigure"):
        # captions may have characters that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    config = options.config
    accelerator = build_accelerator(config)
    family = get_family(config.model)
    process = ProcessInfo.of(accelerator)
    prompts = extra_prompts(config, family)
    with DatasetBuilder.opened(config.data, family, process) as builder:
        builder.extra_prompts = prompts
        plan = builder.plan(not config.bucket_mode)
        if not accelerator.is_main_process:
            return 0
        split = builder.split(plan.job.planned)
        samples = PlanSamples(plan, split.held_out)
        print(report(config, plan, samples, family))
        if options.sheets is None:
            return 0
        result = draw_sheets(samples, family, Path(options.sheets), options.decode)
        print()
        for line in result.lines():
            print(line)
        return result.exit_code


def report(config: TrainConfig, plan: DataPlan, samples: PlanSamples, family: ModelFamily) -> str:
    """Return the report, section by section."""
    survey = Survey(samples, family, config.export.trigger_words or "")
    latents = latents_amount(plan, samples, family)
    conditioning = conditioning_amount(plan, family)
    sections = {
        "sources": source_lines(survey),
        "buckets": bucket_lines(survey, config.batch_size),
        "images": image_lines(survey, plan.skipped),
        "captions": caption_lines(config.export.trigger_words, survey),
        "validation": [validation_line(config.data, samples)],
        "encoding": encoding_lines(config.data, latents, conditioning),
    }
    texts = []
    for name, lines in sections.items():
        indented_lines = [INDENT + line for line in lines]
        texts.append("\n".join([name, *indented_lines]))
    return "\n\n".join(texts)


def source_lines(survey: Survey) -> list[str]:
    """Return a table with a line per source, and one for all."""
    table = [SOURCE_COLUMNS]
    for number, config in enumerate(survey.samples.source_configs):
        counts = survey.sources[number]
        row = [
            config.path,
            source_kind(config),
            source_use(config, is_validation=number >= survey.samples.first_validation_source),
            str(counts.num_samples),
            str(counts.num_held_out),
            str(counts.num_captions),
            str(counts.repeats),
            str(counts.weight),
            str(counts.visits),
        ]
        table.append(row)
    if len(survey.sources) > 1:
        table.append(total_row(survey))
    return align_columns(table, num_left=3)


def total_row(survey: Survey) -> list[str]:
    """Return the line for all sources."""
    counts = survey.sources
    num_samples = sum(source.num_samples for source in counts)
    num_held_out = sum(source.num_held_out for source in counts)
    num_captions = sum(source.num_captions for source in counts)
    visits = sum(source.visits for source in counts)
    return [
        "all",
        "",
        "",
        str(num_samples),
        str(num_held_out),
        str(num_captions),
        "",
        "",
        str(visits),
    ]


def source_kind(config: SourceConfig) -> str:
    """Return the kind of a source, detected if it is not set."""
    if config.kind != "auto":
        return config.kind
    return detect_kind(Path(config.path))


def source_use(config: SourceConfig, is_validation: bool) -> str:
    if is_validation:
        return "validation"
    return "regularization" if config.regularization else "training"


def bucket_lines(survey: Survey, batch_size: int) -> list[str]:
    """Return a table with a line per bucket, and notes on buckets that rarely fill a
    micro-batch."""
    table = [BUCKET_COLUMNS]
    rarely_full = NameList()
    for bucket, counts in sorted(survey.buckets.items()):
        num_batches = counts.visits / batch_size
        row = [
            str(bucket),
            str(counts.num_samples),
            str(counts.num_held_out),
            str(counts.visits),
            f"{num_batches:.4g}",
            f"{counts.cropped.mean:.1%}",
            f"{counts.cropped.maximum:.1%}",
        ]
        table.append(row)
        if 0 < num_batches < 1:
            rarely_full.add(
                f"{bucket} has {counts.visits} visits per epoch, and a micro-batch of {batch_size} "
                f"every {1 / num_batches:.3g} epochs"
            )
    return align_columns(table) + rarely_full.lines()


def image_lines(survey: Survey, num_skipped: int) -> list[str]:
    """Return facts about the images. `num_skipped`: unusable files."""
    total = f"{len(survey.samples)}"
    if num_skipped:
        total += f", {num_skipped} skipped"
    enlarged = survey.enlarged.names()
    copies = find_copies(survey.samples)
    group_noun = " group" if copies.count == 1 else " groups"
    facts = {
        "total": total,
        "smaller than their bucket": counted(
            enlarged, ", enlarged; --data.no_upscale gives them a smaller bucket"
        ),
        "the same file more than once": counted(copies, group_noun),
    }
    return list_facts(facts)


def counted(names: NameList, note: str = "") -> Fact:
    """Return a number with a note, and the names; "none" for an empty list."""
    if not names.count:
        return "none"
    return [f"{names.count}{note}", *names.lines()]


def caption_lines(trigger_words: str | None, survey: Survey) -> list[str]:
    """Return facts about the captions."""
    captions = survey.captions
    num_captions = sum(counts.num_captions for counts in survey.sources)
    if not num_captions:
        return list_facts({"total": "none: data that was encoded elsewhere has no captions"})
    max_tokens = captions.max_tokens
    facts: dict[str, Fact] = {
        "total": f"{num_captions}, {captions.num_different} of them different",
        "variants per image": str(survey.caption_variants),
        "tokens": f"{captions.tokens}; the text encoder reads at most {max_tokens}",
        "too long, cut by the encoder": counted(captions.too_long),
        "empty": counted(captions.empty),
    }
    for trigger, names in captions.without_trigger.items():
        facts[f"without {trigger!r}"] = counted(names, "; the run puts it before them")
    if trigger_words:
        facts[f"trained without {trigger_words!r}"] = counted(
            captions.without_trigger_words,
            " (--export.trigger_words); --data.captions.trigger adds it",
        )
    return list_facts(facts)


def validation_line(data: DataConfig, samples: PlanSamples) -> str:
    """Return how many images are held out, and which."""
    num_held_out = int(samples.is_held_out.sum())
    text = f"{num_held_out} of {len(samples)} images"
    if data.validation_path is not None:
        return f"{text}: those of {data.validation_path}"
    if data.validation_fraction:
        return (
            f"{text}: those with the lowest content hash (--data.validation_fraction "
            f"{data.validation_fraction:g})"
        )
    return "no image is held out (--data.validation_fraction, --data.validation_path)"


def encoding_lines(data: DataConfig, latents: Amount, conditioning: Amount) -> list[str]:
    """Return a table of the rows that will be encoded, and their size."""
    latents_name = "latents, with mirrored ones" if data.random_flip else "latents"
    table = [
        ["", "total", "stored", "to encode", "size to write"],
        [latents_name, *amount_cells(latents)],
        ["conditioning", *amount_cells(conditioning)],
    ]
    num_bytes = latents.missing_bytes + conditioning.missing_bytes
    return [*align_columns(table), space_line(data.cache_dir, num_bytes)]


def amount_cells(amount: Amount) -> list[str]:
    """Return the numbers of one line of the table."""
    return [
        str(amount.num_rows),
        str(amount.num_stored),
        str(amount.num_missing),
        format_bytes(amount.missing_bytes),
    ]


def space_line(cache_dir: str, num_bytes: int) -> str:
    """Return the space that the encoded data takes, and the free space."""
    if not num_bytes:
        return f"everything is stored in {cache_dir} already"
    num_free = shutil.disk_usage(cache_dir).free
    line = (
        f"{format_bytes(num_bytes)} will be written to {cache_dir}, where "
        f"{format_bytes(num_free)} are free"
    )
    if num_free < num_bytes:
        line += ": NOT ENOUGH"
    return line


def format_bytes(count: float) -> str:
    """Return a number of bytes in a suitable unit."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
