"""`models`: the list is the table of docs/memory.md, and names options that exist."""

import json

import pytest
from helpers import comfy_keys
from helpers.comfy_keys import FAMILIES as NAMED
from helpers.project import PROJECT

import train_lora
from models import FAMILIES
from models.detect import family_classes
from tools.catalog.family import family_page, released_of
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


def test_a_family_is_shown_with_its_models(capsys):
    assert train_lora.main(["models", "qwen_image_edit_plus"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    (planned,) = [line for line in lines if line.startswith("Qwen-Image-Edit-2511")]
    assert planned.endswith("bf16   bf16")
    (unplanned,) = [line for line in lines if line.startswith("Qwen-Image-Edit-2509")]
    assert unplanned.endswith("see plan")
    assert "images, with up to 3 control images (needed)" in out
    assert "recipes/qwen_image_edit_plus.yaml" in out
    assert train_lora.main(["models", "flux1", "--card", "16"]) == 0
    assert all("flux1 " in line for line in capsys.readouterr().out.splitlines()[1:3])
    assert train_lora.main(["models", "flux"]) == 2
    assert "flux: is no model family. The families are anima, " in capsys.readouterr().err


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_has_a_page(name):
    page = "\n".join(family_page(name, planned_models()))
    assert family_classes()[name].pipelines[0] in page
    assert released_of(family_classes()[name])
    for model in released_of(family_classes()[name]).values():
        assert all(hub_id in page for hub_id in model["hub_ids"])


def test_what_is_said_about_names_is_true():
    """The key files are those of a ComfyUI that was run, except where their README says otherwise."""
    readme = (comfy_keys.KEYS / "README.md").read_text()
    was_run = {NAMED[name] for name in NAMED if f"`{name}` is newer" not in readme}
    was_run.add("sd15")  # tests/adapter_files compare its names with comfy_sd15_keys.json
    classes = family_classes()
    names_of_run = [classes[name].layer_names for name in was_run]
    for family_class in classes.values():
        is_said = "ComfyUI 0.33.0, which was run" in family_class.name_check
        assert is_said == (family_class.layer_names in names_of_run), family_class.name
