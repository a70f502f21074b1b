"""`data`: what a run would be trained on, told before anything is encoded, and sheets of its
images."""

import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.process import ProcessInfo
from data.config import DataConfig
from data.precompute.build import DataPlan, DatasetBuilder
from data.precompute.plan import clip_frames, missing_positions
from data.store.tables import list_owners
from models import get_family
from models.base import ModelFamily
from tools.data import contact_sheets
from tools.data.options import DataOptions
from tools.data.survey import Named, Survey, alike, kind, sizes
from training.config import TrainConfig
from training.distributed.accelerator import build_accelerator

INDENT = "  "
FLOAT_BYTES = 4


def run(options: DataOptions) -> int:
    """Prints the report, then draws the sheets. Returns the exit code: 1 if something could not be
    drawn."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # captions may have what the terminal does not
    config = options.config
    accelerator, family = build_accelerator(config), get_family(config.model)
    process = ProcessInfo.of(accelerator)
    with DatasetBuilder.opened(config.data, family, process) as build:
        planned = build.plan(not config.bucket_mode)
        if not accelerator.is_main_process:
            return 0
        survey = Survey(
            planned, build.split(planned.job.planned)[1], family, config.export.trigger_words or ""
        )
        print(report(config, planned, survey))
        if options.sheets is None:
            return 0
        drawn = contact_sheets.draw(planned, survey, Path(options.sheets), options.decode)
        print("\n".join(["", *drawn.lines()]))
        return drawn.exit_code


def report(config: TrainConfig, planned: DataPlan, survey: Survey) -> str:
    """All that is printed, section by section."""
    held_out = int(survey.held_out.sum())
    most = Encoding.of(planned, survey.family)
    sections = {
        "sources": source_table(config.data, survey),
        "buckets": bucket_table(config.batch_size, survey),
        "images": image_lines(config.data, planned, survey),
        "captions": caption_lines(config, survey),
        "validation": [
            validation_line(config.data, f"{held_out} of {len(survey.held_out)} images")
        ],
        "encoding": encoding_lines(config.data, most),
    }
    return "\n\n".join(
        "\n".join([name, *(INDENT + line for line in lines)]) for name, lines in sections.items()
    )


def aligned(lines: Iterable[list[str]], left: int = 1) -> list[str]:
    """Columns of words, all but the first `left` of them aligned to the right."""
    table = list(lines)
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


def facts(found: dict[str, str | list[str]]) -> list[str]:
    """Named facts, one below the other; of a list, all but the first are indented."""
    width = max(map(len, found))
    lines: list[str] = []
    for name, value in found.items():
        first, *others = [value] if isinstance(value, str) else value
        lines += [
            f"{name.ljust(width)}  {first}",
            *(f"{' ' * width}    {other}" for other in others),
        ]
    return lines


def counted(found: Named, what: str = "") -> str | list[str]:
    """None, or how many there are and which."""
    return [f"{found.count}{what}", *found.lines()] if found.count else "none"


def source_table(data: DataConfig, survey: Survey) -> list[str]:
    lines = [
        [
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
    ]
    sources = survey.work.planner.sources
    for number, (opened, counts) in enumerate(zip(sources.opened, survey.sources, strict=True)):
        use = "regularization" if opened.config.regularization else "training"
        use = "validation" if number >= sources.first_held_out else use
        lines.append(
            [
                opened.config.path,
                kind(opened.config),
                use,
                str(counts.images),
                str(counts.held_out),
                str(counts.captions),
                str(counts.repeats),
                str(counts.weight),
                str(counts.visits),
            ]
        )
    total = [
        sum(getattr(s, n) for s in survey.sources)
        for n in ("images", "held_out", "captions", "visits")
    ]
    if len(survey.sources) > 1:
        lines.append(["all", "", "", *map(str, total[:3]), "", "", str(total[3])])
    return aligned(lines, 3)


def bucket_table(batch_size: int, survey: Survey) -> list[str]:
    lines = [
        [
            "width x height",
            "images",
            "held out",
            "visits per epoch",
            "micro-batches per epoch",
            "cropped away",
            "at most",
        ]
    ]
    slow = []
    for (width, height, frames), counts in sorted(survey.buckets.items()):
        batches = counts.visits / batch_size
        size = f"{width} x {height}" + f", {frames} frames" * (frames > 1)
        lines.append(
            [
                size,
                str(counts.images),
                str(counts.held_out),
                str(counts.visits),
                f"{batches:.4g}",
                f"{counts.cropped.mean:.1%}",
                f"{counts.cropped.most:.1%}",
            ]
        )
        if 0 < batches < 1:
            slow.append(
                f"{size} has {counts.visits} visits per epoch, and a micro-batch of {batch_size} "
                f"every {batch_size / counts.visits:.3g} epochs"
            )
    found = Named()
    for line in slow:
        found.add(line)
    return aligned(lines) + found.lines()


def image_lines(data: DataConfig, planned: DataPlan, survey: Survey) -> list[str]:
    images = len(planned.job.planned)
    found: dict[str, str | list[str]] = {
        "in all": f"{images}" + f", {planned.skipped} skipped" * bool(planned.skipped)
    }
    same = alike(survey.work, survey.held_out)
    if survey.enlarged:
        error_list = Named(survey.enlarged, [said for _, _, said in survey.most_enlarged]).lines()
        how = f"{survey.enlarged}, enlarged; --data.no_upscale gives them a smaller bucket"
        found["smaller than their bucket"] = [how, *error_list]
    else:
        found["smaller than their bucket"] = "none"
    found["the same file more than once"] = counted(same, " group" + "s" * (same.count > 1))
    return facts(found)


def caption_lines(config: TrainConfig, survey: Survey) -> list[str]:
    captions = survey.captions
    given = sum(source.captions for source in survey.sources)
    found: dict[str, str | list[str]] = {"in all": f"{given}, {captions.distinct} of them differ"}
    if not given:
        return facts({"in all": "none: what was encoded elsewhere keeps no captions"})
    found["variants per image"] = f"{survey.variants}"
    found["tokens"] = f"{captions.tokens}; the text encoder sees {captions.limit} at most"
    found["too long, cut by the encoder"] = counted(captions.over)
    found["empty"] = counted(captions.empty)
    for trigger, lacking in captions.given_trigger.items():
        found[f"without {trigger!r}"] = counted(lacking, ", which the run puts before them")
    if config.export.trigger_words:
        name = f"trained without {config.export.trigger_words!r}"
        found[name] = counted(
            captions.without_trigger,
            " (--export.trigger_words; --data.captions.trigger puts it there)",
        )
    return facts(found)


def validation_line(data: DataConfig, held_out: str) -> str:
    if data.validation_path is not None:
        return f"{held_out}: those of {data.validation_path}"
    if data.validation_fraction:
        return (
            f"{held_out}: those with the lowest content hash (--data.validation_fraction "
            f"{data.validation_fraction:g})"
        )
    return "no image is held out (--data.validation_fraction, --data.validation_path)"


@dataclass(frozen=True)
class Encoding:
    """Latents and conditionings that differ, how many of them are not stored, and the bytes that
    these will take."""

    latents: int
    new_latents: int
    latent_bytes: int
    texts: int
    new_texts: int
    text_bytes: int

    @classmethod
    def of(cls, planned: DataPlan, family: ModelFamily) -> "Encoding":
        rows, stores, config = planned.job.planned, planned.stores, planned.job.config
        media, texts = rows.keys("media_keys"), rows.keys("caption_keys")
        lacking = missing_positions(media, stores.media, np.ones(len(media), bool))
        owners = list_owners(rows.lengths("media_keys"))[lacking]
        numbers = family.latent_channels * (2 if config.vae_sampling == "sample" else 1) + (
            config.masks != "none"
        )
        cells = (sizes(rows)[owners].astype(np.int64) // family.latent_step()).prod(axis=1)
        cells *= 1 + (np.maximum(clip_frames(rows), 1)[owners] - 1) // family.frame_step
        of_images = planned.job.have_images()[list_owners(rows.lengths("caption_keys"))]
        # caption dropout needs the empty prompt, which is in no row
        empty = planned.missing_captions - len(missing_positions(texts, stores.text, of_images))
        new_texts = len(missing_positions(texts, stores.text, np.ones(len(texts), bool))) + empty
        return cls(
            len(np.unique(media)),
            len(lacking),
            int(cells.sum()) * numbers * FLOAT_BYTES,
            len(np.unique(texts)) + empty,
            new_texts,
            new_texts * family.cond_bytes() if new_texts else 0,
        )


def encoding_lines(data: DataConfig, encoding: Encoding) -> list[str]:
    total = encoding.latent_bytes + encoding.text_bytes
    free = shutil.disk_usage(data.cache_dir).free
    mirrored = ", with mirrored ones" * data.random_flip
    written = (
        f"{size_of(total)} will be written to {data.cache_dir}, where {size_of(free)} are free"
    )
    return [
        *aligned(
            [
                ["", "in all", "stored", "to be made", "size of these"],
                [
                    "latents" + mirrored,
                    *amounts(encoding.latents, encoding.new_latents, encoding.latent_bytes),
                ],
                [
                    "conditionings",
                    *amounts(encoding.texts, encoding.new_texts, encoding.text_bytes),
                ],
            ]
        ),
        (written + ": NOT ENOUGH" * (free < total))
        if total
        else f"nothing is left to do for {data.cache_dir}",
    ]


def amounts(every: int, new: int, size: int) -> list[str]:
    return [str(every), str(every - new), str(new), size_of(size)]


def size_of(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
