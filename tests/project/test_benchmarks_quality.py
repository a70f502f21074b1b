"""benchmarks/quality.py: the trainer accepts every choice, and a table is printed."""

import sys

import pytest

from benchmarks import quality
from training.cli import load_config

CHOICES = [
    (base, group, choice)
    for base, groups in quality.GROUPS.items()
    for group, choices in groups.items()
    for choice in choices
]


@pytest.mark.parametrize(("base", "group", "choice"), CHOICES)
def test_every_choice_is_an_option(base, group, choice):
    options = quality.GROUPS[base][group][choice]
    load_config([str(quality.RECIPES[base]), *quality.COMMON_OPTIONS, *options])


def test_the_choices_of_a_group_differ():
    for groups in quality.GROUPS.values():
        for choices in groups.values():
            assert len({tuple(options) for options in choices.values()}) == len(choices)


@pytest.mark.slow
def test_a_tiny_table_is_printed_and_kept(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.jsonl"
    arguments = ["quality.py", "--tiny", "--groups=loss space", f"--out={out}"]
    for _ in range(2):  # the second time nothing is trained
        monkeypatch.setattr(sys, "argv", arguments)
        quality.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("| prediction (default)", "| x0"))]
    assert len(rows) == 4
    assert rows[:2] == rows[2:]
    assert len(out.read_text().splitlines()) == 2
