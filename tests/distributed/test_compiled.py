"""Compiled blocks under DDP and FSDP2: the same run, without graph breaks."""

import re

import pytest
from helpers.runs import assert_same_run, common, launched, runs_file

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_compiled_blocks_work_in_every_engine(engine, tmp_path):
    options = [*common(tmp_path / "cache"), "--gradient_checkpointing", "--checkpoint_depth=1"]
    eager = [*options, f"--output_dir={tmp_path / 'eager'}"]
    compiled = [*options, f"--output_dir={tmp_path / 'compiled'}", "--compile=blocks"]
    result = launched(engine, 2, runs_file(tmp_path, eager, compiled), "traces_eagerly")
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same_run(tmp_path / "eager", tmp_path / "compiled")
    (counts,) = re.findall(r"compiled (\d+) graphs? with (\d+) graph breaks?", result.stdout)
    assert counts == ("8", "0")  # of eight blocks, no two alike
