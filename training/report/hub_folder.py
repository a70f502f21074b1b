"""A folder for the Hugging Face Hub: the adapter, samples, and a model card."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from common.atomic import new_folder
from common.errors import ConfigError
from common.hashing import hash_of
from models.config import is_hub_id
from training.report.output_files import comfyui_file, diffusers_file, exported_names
from training.report.page import text_environment
from training.report.run_files import RunFiles
from training.report.sample_pictures import prompt_text
from training.run_folder import PREVIEW, WORKFLOW

CARD = "README.md"
CARD_TEMPLATE = "card.md"
SIGNATURE = "\n<!-- train-lora "
"""Precedes the hash of a card, at its end."""
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
    """Write the folder, which replaces an earlier one; return whether it keeps an edited README.md.

    Raises ConfigError before the end of a run."""
    adapters = main_adapters(run)
    if not adapters:
        raise ConfigError(
            f"OUTPUT_DIR {run.folder}: has no adapter yet. Wait for the end of the run"
        )
    samples = last_samples(run)
    preview, workflow = run.folder / PREVIEW, run.folder / WORKFLOW
    has_pictures = bool(samples) or preview.is_file()
    card = signed(model_card(run, samples, publication))
    edited_card = read_edited_card(folder / CARD)
    with new_folder(folder) as partial_path:
        for path in [*adapters, *samples.values()]:
            copy_to(path, partial_path)
        if not samples and preview.is_file():
            copy_to(preview, partial_path)
        if workflow.is_file() and has_pictures:  # else its prompt is a caption of the data
            copy_to(workflow, partial_path)
        card_path = partial_path / CARD
        card_path.write_text(edited_card or card, encoding="utf-8")
    return edited_card is not None


def signed(card: str) -> str:
    """Return a card with its hash, by which a later call knows that nobody has edited it."""
    digest = hash_of(card)
    return f"{card}{SIGNATURE}{digest} -->\n"


def read_edited_card(path: Path) -> str | None:
    """Return a card that somebody has edited; None if the file is missing or as it was written."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    card, _, _ = text.rpartition(SIGNATURE)
    return None if text == signed(card) else text


def main_adapters(run: RunFiles) -> list[Path]:
    """Return the adapters of the end of the run in all formats that its options ask for."""
    names = exported_names(run)
    paths = [run.folder / name for name in names.values()]
    return [path for path in paths if path.exists()]


def copy_to(path: Path, folder: Path) -> None:
    """Copy a file or a folder into a folder."""
    target = folder / path.name
    if path.is_dir():
        shutil.copytree(path, target)
    else:
        shutil.copyfile(path, target)


def last_samples(run: RunFiles) -> dict[int, Path]:
    """Return the first samples of the last step that has any, by the number of their prompts.

    None if the exported weights are those of another step."""
    is_of_last_step = run.options["export"].get("weights") != "best"
    if not run.samples or not is_of_last_step:
        return {}
    last_step = max(run.samples)
    files = sorted(run.samples[last_step].items())
    return dict(files[:MAX_SAMPLES])


def model_card(run: RunFiles, samples: dict[int, Path], publication: Publication) -> str:
    """Return the content of README.md. `samples`: by the number of the prompt."""
    model = str(run.options["model"].get("path"))
    base_model = model if is_hub_id(model) else None
    media = run.facts.get("media", "image")
    edits = bool(run.facts.get("has_control_images"))
    trigger_words = run.facts.get("trigger_words") or None
    widget = []
    for number, path in samples.items():
        widget.append({"text": prompt_text(run, number), "output": {"url": path.name}})
    data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        license=publication.license_name,
        pipeline_tag="image-to-image" if edits else f"text-to-{media}",
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
        comfyui_file=comfyui_file(run),
        diffusers_file=diffusers_file(run),
        peft_folder=exported_names(run).get("peft"),
        base=base_model or Path(model).name,
        repo=publication.repo,
        edits=edits,
        base_model=base_model,
        trigger_words=trigger_words,
        num_images=run.facts.get("num_trained"),
        slider=run.facts.get("slider"),
        is_modular=bool(run.facts.get("is_modular")),
        settings=settings,
        algorithm=run.options.get("algorithm", "Adapter"),
        rank=run.options.get("rank", "?"),
        has_samples=bool(samples),
        has_preview=not samples and (run.folder / PREVIEW).is_file(),
        has_workflow=(run.folder / WORKFLOW).is_file(),
        media=media,
    )
