"""benchmarks/host_time.py: it runs for every algorithm."""

import sys

from benchmarks import host_time


def test_a_tiny_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["host_time.py", "--layers=2", "--repeats=1"])
    assert host_time.main() in (0, 1)  # times mean nothing here
    lines = capsys.readouterr().out.splitlines()
    names = {line.split()[0] for line in lines[2:]}
    assert names == {setting.name for setting in host_time.SETTINGS}
