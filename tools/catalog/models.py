"""`models`: lists the models that have a recipe, and what their training needs."""

import json
from dataclasses import asdict

from tools.catalog.options import ModelsOptions
from tools.catalog.planned import CARDS, WAYS, PlannedModel, planned_models
from tools.tables import NO_VALUE, align_columns

STATUS = (
    "GiB of GPU memory are planned for training with the recipe; `train_lora.py plan <recipe>` also "
    "plans captions and samples.\nNo model has been run with its released weights or on a GPU: "
    "docs/models.md says how each one is tested."
)


def run(options: ModelsOptions) -> int:
    """Print the list; return the exit code."""
    models = planned_models()
    if options.json:
        entries = [asdict(model) for model in models]
        print(json.dumps(entries, indent=1))
        return 0
    rows = [cards_header()]
    for model in models:
        rows.append(cards_row(model))
    if options.card is not None:
        rows = [["model", "family", "recipe", "GiB", "options"]]
        for model in models:
            rows += card_rows(model, options.card)
    for line in align_columns(rows, num_left=len(rows[0])):
        print(line.rstrip())
    print(f"\n{STATUS}")
    return 0


def cards_header() -> list[str]:
    """Return the head of the table without a card."""
    cards = [f"{card} GB" for card in CARDS]
    return ["model", "family", *cards]


def cards_row(model: PlannedModel) -> list[str]:
    """Return the ways to keep a base model on each card."""
    cells = [model.model, model.family]
    for card in CARDS:
        ways = model.ways(card)
        cells.append(" or ".join(ways) or NO_VALUE)
    return cells


def card_rows(model: PlannedModel, card: float) -> list[list[str]]:
    """Return a line for each way with which a model fits into a card."""
    start = [model.model, model.family, model.recipe]
    ways = model.ways(card)
    if not ways:
        least = min(model.training.values())
        return [[*start, f"{least:.1f}", f"does not fit into {card:g} GB"]]
    rows = []
    for way in ways:
        need = model.training[way]
        options = " ".join(WAYS[way])
        rows.append([*start, f"{need:.1f}", options or "no further options"])
    return rows
