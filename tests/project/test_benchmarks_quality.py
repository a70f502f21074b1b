"""benchmarks/quality.py: the trainer accepts every choice, and a table is printed."""

import sys

import pytest

from benchmarks import quality
from training.cli import load_config

CHOICES = [
    (kind, group, choice)
    for kind, demo in quality.DEMOS.items()
    for group, choices in demo.groups.items()
    for choice in choices
]


@pytest.mark.parametrize(("kind", "group", "choice"), CHOICES)
def test_every_choice_is_an_option(kind, group, choice):
    demo = quality.DEMOS[kind]
    load_config([str(demo.recipe), *quality.COMMON_OPTIONS, *demo.groups[group][choice]])


def test_the_choices_of_a_group_differ():
    for demo in quality.DEMOS.values():
        for choices in demo.groups.values():
            assert len({tuple(options) for options in choices.values()}) == len(choices)


@pytest.mark.long
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
