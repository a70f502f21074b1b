"""`models`: the list is the table of docs/memory.md, and names options that exist."""

import json

import pytest
from helpers.project import PROJECT

import train_lora
from tools.catalog.planned import CARDS, WAYS, planned_models
from training.cli import option_types

PAGE = (PROJECT / "docs" / "memory.md").read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("planned", planned_models(), ids=lambda planned: planned.model)
def test_it_is_the_table_of_the_documentation(planned):
    needs, fits = [line for line in PAGE.splitlines() if line.startswith(f"| {planned.model} |")]
    training = dict(zip(WAYS, map(float, cells(needs)[6:11]), strict=True))
    # the page rounds bytes, the list has two digits
    assert planned.training == pytest.approx(training, abs=0.056)
    assert cells(needs)[1] == planned.sample
    ways = [" or ".join(planned.ways(card)) or "-" for card in CARDS]
    assert cells(fits)[1:] == ways
    assert (PROJECT / planned.recipe).is_file()


def test_ways_have_options_of_the_trainer():
    names = {name for name, _ in option_types()}
    for options in WAYS.values():
        for option in options:
            assert option in names


def test_the_list(capsys):
    assert train_lora.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["model", "family", "8", "GB"]
    assert len([line for line in lines if line.startswith("FLUX.1 dev")]) == 1


def test_options_for_a_card(capsys):
    assert train_lora.main(["models", "--card", "12"]) == 0
    out = capsys.readouterr().out
    flux = [line.split("  ")[-1].strip() for line in out.splitlines() if "FLUX.1 dev" in line]
    assert flux == [
        "--model.quantization nf4",
        "--memory.offload_blocks all --memory.offload_activations",
    ]
    assert train_lora.main(["models", "--card", "3"]) == 0
    assert "does not fit into 3 GB" in capsys.readouterr().out


def test_json_and_mistakes(capsys):
    assert train_lora.main(["models", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert {"model", "family", "recipe", "hub_ids", "training"} <= entries[0].keys()
    assert train_lora.main(["models", "--card", "0"]) == 2
    assert "--card 0: expected GB above 0" in capsys.readouterr().err
