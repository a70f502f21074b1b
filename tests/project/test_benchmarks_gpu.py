"""benchmarks/gpu.py on the CPU, with tiny models."""

import json
import subprocess
import sys

import pytest
from helpers.project import PROJECT

COMMAND = [sys.executable, str(PROJECT / "benchmarks" / "gpu.py"), "--device=cpu", "--tiny"]
TINY_MODEL = "z_image, 1024px, batch 1"


def measure(*options: str) -> str:
    process = subprocess.run(
        [*COMMAND, *options], capture_output=True, text=True, timeout=1500, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_results_are_kept_and_not_measured_again(tmp_path):
    out = tmp_path / "results.jsonl"
    tables = [measure("--only", TINY_MODEL, "--out", str(out)) for _ in range(2)]
    assert tables[0] == tables[1]
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [result["key"] for result in results] == [TINY_MODEL, f"{TINY_MODEL}, checkpointed"]
    for result in results:
        assert list(result["result"]) == ["frozen", "LoRA r64"]
        assert all(step["seconds"] > 0 and not step["waits"] for step in result["result"].values())
    assert f"| {TINY_MODEL}: LoRA r64 |" in tables[0]


def test_no_measurement_starts_after_the_time():
    printed = measure("--only", "LoRA, Linear", "--minutes", "0")
    assert "not measured, because 0 minutes are over: error of LoRA, Linear" in printed


@pytest.mark.long
def test_everything_is_measured():
    printed = measure("--minutes", "20")
    assert "not measured" not in printed
    for key in ("error of BOFT, Conv2d", "error of tiny models", "the demo resumed, bit for bit"):
        assert f"| {key} |" in printed
