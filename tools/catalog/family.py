"""`models FAMILY`: the released models of a family, what it takes, and how it is tested."""

import textwrap
from typing import Any

from common.errors import counted
from models.base import ModelFamily
from models.detect import family_classes
from models.released import released_models
from tools.catalog.planned import CARDS, PlannedModel
from tools.catalog.tested import NOT_TESTED, test_lines
from tools.tables import align_columns

LABEL_WIDTH = 16
LINE_WIDTH = 100


def family_page(name: str, planned: list[PlannedModel]) -> list[str]:
    """Return the lines about a family. `planned`: all planned models."""
    family_class = family_classes()[name]
    table = model_rows(family_class, planned)
    lines = align_columns(table, num_left=len(table[0]))
    lines.append("")
    for label, text in facts(family_class).items():
        lines += labeled(label, text)
    for text in test_lines(family_class):
        lines += labeled("tested", text)
    lines += labeled("not tested", NOT_TESTED)
    return lines


def model_rows(family_class: type[ModelFamily], planned: list[PlannedModel]) -> list[list[str]]:
    """Return a table of the released models whose configurations the trainer has.

    The need of some is not planned beforehand; the command `plan` does."""
    header = ["model", "Hub id"]
    for card in CARDS:
        header.append(f"{card} GB")
    rows = [header]
    for model_name, model in released_of(family_class).items():
        cells = ["see plan", *[""] * (len(CARDS) - 1)]
        for entry in planned:
            if entry.model == model_name and entry.family == family_class.name:
                cells = entry.cells()
        for hub_id in model["hub_ids"]:
            rows.append([model_name, hub_id, *cells])
    return rows


def released_of(family_class: type[ModelFamily]) -> dict[str, Any]:
    """Return the released models of a family."""
    models = {}
    for name, model in released_models().items():
        if model["pipeline"] in family_class.pipelines:
            models[name] = model
    return models


def facts(family_class: type[ModelFamily]) -> dict[str, str]:
    """Return what a family trains on and writes, by labels."""
    recipe = f"recipes/{family_class.name}.yaml"
    values = {
        "trains on": media_text(family_class),
        "recipe": recipe,
        "memory": f"python train_lora.py plan {recipe} [--model.path ID]",
        "adapter file": file_text(family_class),
    }
    better_model = family_class.undistilled_model
    if better_model:
        values["distilled"] = f"better train on {better_model} than on distilled models"
    return values


def file_text(family_class: type[ModelFamily]) -> str:
    """Return the format of a family's adapter files."""
    default, *others = family_class.layer_names.file_formats
    if not others:
        return default
    names = " or ".join(others)
    return f"{default}; with layers that this format cannot name, {names}"


def media_text(family_class: type[ModelFamily]) -> str:
    """Return the media of a family's samples, with what they need besides captions."""
    limits = family_class.controls
    text = "videos and images" if family_class.media == "video" else "images"
    if family_class.paints_masks:
        text += ", with masks"
    if limits.max_count:
        needed = "needed" if limits.is_required else "optional"
        text += f", with up to {counted(limits.max_count, 'control image')} ({needed})"
    return text


def labeled(label: str, text: str) -> list[str]:
    """Return a text behind a label, wrapped."""
    first = label.ljust(LABEL_WIDTH)
    rest = " " * LABEL_WIDTH
    return textwrap.wrap(text, LINE_WIDTH, initial_indent=first, subsequent_indent=rest)
