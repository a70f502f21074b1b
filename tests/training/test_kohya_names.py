"""Somebody who comes from kohya's scripts is told the names of this trainer."""

import pytest
from helpers.project import PROJECT

from common.errors import ConfigError
from training.cli import load_config, option_types
from training.kohya_names import KOHYA_NAMES

OPTIONS = {name for name, _ in option_types()}


@pytest.mark.parametrize("name", KOHYA_NAMES)
def test_every_hint_is_an_option(name):
    assert KOHYA_NAMES[name] in OPTIONS
    assert name not in OPTIONS


def test_all_flags_of_kohya_are_listed_together():
    with pytest.raises(ConfigError) as raised:
        load_config(["--network_dim", "16", "--max-train-steps=100"])
    assert "--network_dim: is a name of kohya's scripts. Use --rank" in str(raised.value)
    assert "--max-train-steps: is a name of kohya's scripts. Use --steps" in str(raised.value)


def test_a_recipe_with_names_of_kohya_says_what_they_are_here(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("network_alpha: 8\n")
    with pytest.raises(ConfigError, match=r"no such option; did you mean adapter\.alpha\?"):
        load_config([str(recipe)])


def test_the_table_of_the_docs_names_options():
    page = (PROJECT / "docs" / "training.md").read_text(encoding="utf-8")
    table = page.split("## Coming from kohya")[1].split("## ")[0]
    for name, option in KOHYA_NAMES.items():
        if f"`{name}`" in table:
            assert option in table or option.split(".")[-1] in table
