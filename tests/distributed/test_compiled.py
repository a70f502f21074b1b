"""Compiled blocks, and several buckets of gradients, under DDP and FSDP2: the same run."""

import re

import pytest
from helpers.runs import assert_same_run, common, launched, runs_file

pytestmark = pytest.mark.slow
ENGINES = pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
LARGE = ["--rank=64", "--adapter.targets=all", "--steps=2"]
"""More than a megabyte of gradients in each block, at which DDP would cut a compiled graph."""
NUM_BLOCKS = 8
"""Of the tiny UNet; no two are alike."""


@pytest.mark.long
@ENGINES
def test_compiled_blocks_work_in_every_engine(engine, tmp_path):
    options = [
        *common(tmp_path / "cache"),
        *LARGE,
        "--gradient_checkpointing",
        "--checkpoint_depth=1",
    ]
    eager = [*options, f"--output_dir={tmp_path / 'eager'}"]
    compiled = [*options, f"--output_dir={tmp_path / 'compiled'}", "--compile=blocks"]
    if engine == "ddp":  # the other engine shards these weights
        compiled.append("--memory.offload_blocks=all")
    result = launched(engine, 2, runs_file(tmp_path, eager, compiled), "traces_eagerly")
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same_run(tmp_path / "eager", tmp_path / "compiled")
    (counts,) = re.findall(r"compiled (\d+) graphs? with (\d+) graph breaks?", result.stdout)
    assert counts == (str(NUM_BLOCKS), "0")
    assert result.stdout.count("traced a graph") == 2 * NUM_BLOCKS  # in two processes


@pytest.mark.long
@ENGINES
def test_several_buckets_give_the_same_gradients(engine, tmp_path):
    options = [*common(tmp_path / "cache"), "--grad_accumulation_steps=2"]
    one, several = ([*options, f"--output_dir={tmp_path / name}"] for name in ("one", "several"))
    for run, fault in ((one, []), (several, ["has_small_buckets"])):
        result = launched(engine, 2, runs_file(tmp_path, run), *fault)
        assert result.returncode == 0, result.stdout + result.stderr
    assert_same_run(tmp_path / "one", tmp_path / "several")
