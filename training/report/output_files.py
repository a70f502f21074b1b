"""The files of a run as its report lists them, and how to use them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapter_files import FORMATS
from training.adapter_names import adapter_names, comfyui_adapter, diffusers_adapter
from training.report.run_files import RunFiles
from training.report.sample_pictures import link
from training.run_folder import (
    CONFIG_FILE,
    EVENTS_FILE,
    HUB_FOLDER,
    LOSS_CHART,
    LOSS_FILE,
    METRICS_FILE,
    PREVIEW,
    REPORT,
    SAMPLES_FOLDER,
    STATUS_FILE,
    TRACKER_FILE,
    WORKFLOW,
    WORKFLOW_API,
)

FORMAT_ENDINGS = "|".join(rf"\.{name}" for name in FORMATS)
DIFFUSERS_ALGORITHMS = ("LoRA", "DoRA")
"""Algorithms that diffusers loads."""
KILOBYTE, MEGABYTE = 1e3, 1e6
PURPOSES = {
    REPORT: "this page",
    PREVIEW: "samples before and after training",
    LOSS_CHART: "losses as a picture",
    LOSS_FILE: "losses of all steps",
    METRICS_FILE: "metrics of each log",
    CONFIG_FILE: "all options; with --output_dir and a new folder it repeats the run",
    EVENTS_FILE: "starts, ends and messages",
    STATUS_FILE: "what the run is doing",
    TRACKER_FILE: "id of the run in the tracker",
    WORKFLOW: "draws the first sample in ComfyUI: open it there",
    WORKFLOW_API: "the same for ComfyUI's server",
    "checkpoints": "from which the run is resumed",
    SAMPLES_FOLDER: "samples of all steps",
    HUB_FOLDER: "adapter, samples and model card for the Hugging Face Hub",
    "model_with_lora": "base model with the adapter merged",
}
"""Name of a file or folder -> what it is for."""


@dataclass(frozen=True)
class OutputFile:
    """A file or folder of a run."""

    name: str
    link: str
    purpose: str
    num_bytes: int | None
    """None for folders."""

    @property
    def size_text(self) -> str:
        """Return the size; empty for folders."""
        if self.num_bytes is None:
            return ""
        if self.num_bytes < MEGABYTE:
            return f"{self.num_bytes / KILOBYTE:.3g} kB"
        return f"{self.num_bytes / MEGABYTE:.3g} MB"


def output_files(run: RunFiles, folder: Path) -> list[OutputFile]:
    """Return the files that a run has written, the adapters first. `folder`: of the report."""
    files = []
    for path in [*adapter_files(run), *other_files(run)]:
        purpose = PURPOSES.get(path.name, "adapter")
        num_bytes = path.stat().st_size if path.is_file() else None
        files.append(OutputFile(path.name, link(path, folder), purpose, num_bytes))
    return files


def adapter_files(run: RunFiles) -> list[Path]:
    """Return the exported adapters: files, and folders of PEFT."""
    name = re.escape(run.adapter_name)
    pattern = re.compile(
        rf"{name}(-step\d+)?(\.(raw|ema))?({FORMAT_ENDINGS})?(\.safetensors|\.peft)"
    )
    return sorted(path for path in run.folder.iterdir() if pattern.fullmatch(path.name))


def other_files(run: RunFiles) -> Iterator[Path]:
    for name in PURPOSES:
        path = run.folder / name
        if path.exists():
            yield path


def exported_names(run: RunFiles) -> dict[str, str]:
    """Return the adapter files that the options of a run ask for, by format."""
    formats = run.options["export"].get("formats")
    if isinstance(formats, list):
        return adapter_names(run.adapter_name, formats)
    names = adapter_names(run.adapter_name, [])  # of a config that is not readable
    all_names = adapter_names(run.adapter_name, [*names, *FORMATS])
    for file_format, name in all_names.items():
        path = run.folder / name
        if path.exists():
            names[file_format] = name
    return names


def comfyui_file(run: RunFiles) -> str | None:
    """Return the adapter file that ComfyUI reads, if it exists."""
    names = exported_names(run)
    reads_diffusers = run.facts.get("comfyui_reads_diffusers", True)
    name = comfyui_adapter(names, reads_diffusers)
    return existing_name(run, name)


def diffusers_file(run: RunFiles) -> str | None:
    """Return the adapter file that diffusers reads, if it exists."""
    conversion = str(run.options["export"].get("convert", ""))
    algorithm = run.options.get("algorithm")
    is_lora = algorithm in DIFFUSERS_ALGORITHMS or conversion.startswith("lora")
    if not is_lora:
        return None
    names = exported_names(run)
    name = diffusers_adapter(names)
    return existing_name(run, name)


def existing_name(run: RunFiles, name: str | None) -> str | None:
    """Return the name of a file in the folder of a run; None if there is no such file."""
    if name is None or not (run.folder / name).is_file():
        return None
    return name


def usage(run: RunFiles) -> dict[str, str]:
    """Return for each program how the adapter is used there; empty before it is written."""
    texts = {}
    name = comfyui_file(run)
    if name is not None:
        text = f"Copy {name} into ComfyUI/models/loras and load it with the node Load LoRA."
        if (run.folder / WORKFLOW).is_file():
            text += f" Or open {WORKFLOW}, which draws the first sample."
        texts["ComfyUI"] = text
    name = diffusers_file(run)
    if name is not None:
        texts["diffusers"] = f'pipeline.load_lora_weights("{run.name}", weight_name="{name}")'
    words = run.facts.get("trigger_words")
    if words and texts:
        texts["Trigger words"] = str(words)
    return texts
