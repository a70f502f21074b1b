"""`models`: lists the models that have a recipe, and what their training needs."""

import json
from dataclasses import asdict

from tools.catalog.options import ModelsOptions
from tools.catalog.planned import CARDS, WAYS, PlannedModel, planned_models
from tools.tables import align_columns
from training.memory.changes import as_options

PLANNED = (
    "GiB of GPU memory are planned for training with the recipe; `train_lora.py plan <recipe>` also "
    "plans captions and samples.\n`train_lora.py models --card 12` shows the options of the ways that fit."
)
STATUS = (
    "No model has been run with its released weights or on a GPU: "
    "docs/models.md says how each one is tested."
)


def run(options: ModelsOptions) -> int:
    """Print the list; return the exit code."""
    models = planned_models()
    if options.family is not None:
        models = [model for model in models if model.family == options.family]
    if options.json:
        entries = [asdict(model) for model in models]
        print(json.dumps(entries, indent=1))
        return 0
    if options.family is not None and options.card is None:
        from tools.catalog.family import family_page  # imports torch

        print("\n".join(family_page(options.family, models)))
        print(f"\n{PLANNED}")
        return 0
    if options.card is None:
        rows = common_cards(models)
    else:
        rows = one_card(models, options.card)
    for line in align_columns(rows, num_left=len(rows[0])):
        print(line.rstrip())
    print(f"\n{PLANNED}\n{STATUS}")
    return 0


def common_cards(models: list[PlannedModel]) -> list[list[str]]:
    """Return a table of the ways to keep each base model on common cards."""
    header = ["model", "family"]
    for card in CARDS:
        header.append(f"{card} GB")
    rows = [header]
    for model in models:
        row = [model.model, model.family]
        row += model.cells()
        rows.append(row)
    return rows


def one_card(models: list[PlannedModel], card: float) -> list[list[str]]:
    """Return a table of the options with which each model fits into a card."""
    header = ["model", "family", "recipe", "GiB", "options"]
    rows = [header]
    for model in models:
        rows += card_rows(model, card)
    return rows


def card_rows(model: PlannedModel, card: float) -> list[list[str]]:
    """Return a line for each way with which a model fits into a card."""
    start = [model.model, model.family, model.recipe]
    ways = model.ways(card)
    if not ways:
        smallest_need = min(model.training.values())
        return [[*start, f"{smallest_need:.1f}", f"does not fit into {card:g} GB"]]
    rows = []
    for way in ways:
        need = model.training[way]
        options = as_options(WAYS[way])
        rows.append([*start, f"{need:.1f}", options or "no further options"])
    return rows
