"""A folder for the Hugging Face Hub: the adapter, samples, and a model card."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from common.atomic import new_folder
from common.errors import ConfigError
from models.config import is_hub_id
from training.report.output_files import DIFFUSERS_ALGORITHMS, adapter_files
from training.report.page import text_environment
from training.report.run_files import RunFiles
from training.report.sample_pictures import prompt_text
from training.run_folder import PREVIEW, WORKFLOW

CARD = "README.md"
CARD_TEMPLATE = "card.md"
OTHER_WEIGHTS = re.compile(r"-step\d{8}\.|\.(raw|ema)\.")
"""In names of adapters of single steps, and of the weights that are not the main ones."""
MAX_SAMPLES = 8
SHOWN_OPTIONS = (
    "algorithm",
    "rank",
    "steps",
    "batch_size",
    "grad_accumulation_steps",
    "learning_rate",
    "optimizer",
    "training_dtype",
    "seed",
)
"""Options in the card."""


@dataclass(frozen=True)
class Publication:
    """The repository of an adapter."""

    repo: str
    """user/name on the Hub."""
    license_name: str | None
    is_public: bool = False
    """True: a new repository is public."""


def write_hub_folder(run: RunFiles, folder: Path, publication: Publication) -> bool:
    """Write the folder, which replaces an earlier one; return whether it keeps an earlier README.md.

    The README.md may have been edited. Raises ConfigError before the end of a run."""
    adapters = main_adapters(run)
    if not adapters:
        raise ConfigError(
            f"OUTPUT_DIR {run.folder}: has no adapter yet. Wait for the end of the run"
        )
    samples = last_samples(run)
    preview, workflow = run.folder / PREVIEW, run.folder / WORKFLOW
    card = model_card(run, adapters[0].name, samples, publication)
    earlier_card = folder / CARD
    is_kept = earlier_card.is_file()
    if is_kept:
        card = earlier_card.read_text(encoding="utf-8")
    with new_folder(folder) as partial_path:
        for path in [*adapters, *samples.values()]:
            copy_to(path, partial_path)
        if not samples and preview.is_file():
            copy_to(preview, partial_path)
        if workflow.is_file():
            copy_to(workflow, partial_path)
        card_path = partial_path / CARD
        card_path.write_text(card, encoding="utf-8")
    return is_kept


def main_adapters(run: RunFiles) -> list[Path]:
    """Return the adapters of the end of the run in all formats, first the one without a format in its
    name."""
    adapters = [path for path in adapter_files(run) if not OTHER_WEIGHTS.search(path.name)]
    return sorted(adapters, key=lambda path: (path.suffix == ".peft", len(path.name)))


def copy_to(path: Path, folder: Path) -> None:
    """Copy a file or a folder into a folder."""
    target = folder / path.name
    if path.is_dir():
        shutil.copytree(path, target)
    else:
        shutil.copyfile(path, target)


def last_samples(run: RunFiles) -> dict[int, Path]:
    """Return the first samples of the last step that has any, by the number of their prompts."""
    if not run.samples:
        return {}
    last_step = max(run.samples)
    files = sorted(run.samples[last_step].items())
    return dict(files[:MAX_SAMPLES])


def model_card(run: RunFiles, file: str, samples: dict[int, Path], publication: Publication) -> str:
    """Return the content of README.md. `file`: name of the adapter. `samples`: by the number of the
    prompt."""
    model = str(run.options["model"].get("path"))
    base_model = model if is_hub_id(model) else None
    media = run.facts.get("media", "image")
    trigger_words = run.facts.get("trigger_words") or None
    widget = []
    for number, path in samples.items():
        widget.append({"text": prompt_text(run, number), "output": {"url": path.name}})
    data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        license=publication.license_name,
        pipeline_tag=f"text-to-{media}",
        tags=["lora", "diffusers", "template:sd-lora", "train-lora"],
        instance_prompt=trigger_words,
        widget=widget or None,
    )
    settings: dict[str, Any] = {}
    for name in SHOWN_OPTIONS:
        if name in run.options:
            settings[name] = run.options[name]
    template = text_environment().get_template(CARD_TEMPLATE)
    return template.render(
        data=data.to_yaml(),
        name=run.name,
        file=file,
        base=base_model or Path(model).name,
        repo=publication.repo,
        base_model=base_model,
        trigger_words=trigger_words,
        num_images=run.facts.get("num_trained"),
        settings=settings,
        algorithm=run.options.get("algorithm", "Adapter"),
        rank=run.options.get("rank", "?"),
        loads_in_diffusers=run.options.get("algorithm") in DIFFUSERS_ALGORITHMS,
        has_samples=bool(samples),
        has_preview=not samples and (run.folder / PREVIEW).is_file(),
        has_workflow=(run.folder / WORKFLOW).is_file(),
        is_peft=file.endswith(".peft"),
        media=media,
    )
