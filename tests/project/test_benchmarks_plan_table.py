"""docs/memory.md: the table is what benchmarks/plan_table.py makes of the recipes."""

import pytest
from helpers.project import PROJECT, reset_accelerate

from benchmarks import plan_table
from models.released import released_models

PAGE = (PROJECT / "docs" / "memory.md").read_text(encoding="utf-8")


def cells_in_page(model: str) -> list[str]:
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {model} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_recipe_is_in_the_table():
    for model in plan_table.RECIPES:
        assert model in released_models()
        assert len(cells_in_page(model)) == 14, model


@pytest.mark.long
@pytest.mark.parametrize("model", ["Stable Diffusion 1.5", "FLUX.2 klein 4B", "Z-Image"])
def test_the_table_is_current(model):
    reset_accelerate()
    (row,) = plan_table.rows([model])
    assert cells_in_page(model) == row.cells()
    reset_accelerate()
