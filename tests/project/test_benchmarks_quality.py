"""benchmarks/quality.py: the trainer accepts every choice, and a table is printed."""

import sys

import pytest

from benchmarks import quality
from training.cli import load_config

CHOICES = [(group, choice) for group, choices in quality.GROUPS.items() for choice in choices]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_is_an_option(group, choice):
    load_config([str(quality.RECIPE), *quality.COMMON_OPTIONS, *quality.GROUPS[group][choice]])


def test_the_choices_of_a_group_differ():
    for choices in quality.GROUPS.values():
        assert len({tuple(options) for options in choices.values()}) == len(choices)


@pytest.mark.slow
def test_a_tiny_table_is_printed_and_kept(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.jsonl"
    arguments = ["quality.py", "--tiny", "--groups=loss space", f"--out={out}"]
    for _ in range(2):  # the second time nothing is trained
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setitem(quality.GROUPS, "loss space", dict(quality.GROUPS["loss space"]))
        quality.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("| prediction (default)", "| x0"))]
    assert len(rows) == 4
    assert rows[:2] == rows[2:]
    assert len(out.read_text().splitlines()) == 2
