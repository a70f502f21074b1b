"""benchmarks/scaling.py: it runs, counts the bytes that a step sends, and calculates large runs."""

import re
from dataclasses import replace

import pytest
from helpers.project import PROJECT

from benchmarks import on_paper, scaling


@pytest.mark.slow
@pytest.mark.long
def test_a_tiny_run_prints_every_figure(capsys):
    assert scaling.main(["--tiny"]) == 0
    printed = capsys.readouterr().out
    header = next(line for line in printed.splitlines() if line.startswith("ms "))
    assert header.split()[1:] == [*scaling.TIMES, "samples/s"]
    times = {}
    for line in printed.splitlines():
        for setup in (scaling.ALONE, scaling.SEPARATE, scaling.TOGETHER):
            if re.match(rf"{setup} +\d", line):
                numbers = map(float, re.findall(r" (\d+\.\d)", line))
                times[setup] = dict(zip(scaling.TIMES, numbers, strict=False))
    assert times.keys() == {scaling.ALONE, scaling.SEPARATE, scaling.TOGETHER}
    assert times[scaling.ALONE]["reduction"] == times[scaling.ALONE]["waiting"] == 0
    assert times[scaling.TOGETHER]["reduction"] > 0
    assert all(row["forward+backward"] > 0 and row["optimizer"] > 0 for row in times.values())
    assert "1 per step: gloo:all_reduce, 970,752 bytes, group 0" in printed
    assert "1 per step: gloo:all_reduce, 8 bytes, group 1" in printed
    assert (
        "per step one all-reduce of the adapters' 970,752 bytes, one of 8, no more: ok" in printed
    )
    assert re.search(r"checkpoint: \d+ ms, [\d,]+ bytes: adapter.safetensors [\d,]+, ", printed)
    assert re.search(r"SIGTERM to saved: \d+\.\d\d s at most, bar 10: ok", printed)


def test_times_of_a_ring_equal_those_calculated_by_hand():
    """100 M adapter weights, 1 G of the base, all but 100 M in 10 blocks; 16 GPUs in 2 nodes of a 50 GB/s link each."""
    work = on_paper.Workload("", 100_000_000, 1_000_000_000, 900_000_000, 10, flops=0.4 * 989e12)
    link = on_paper.Link("", 50e9, 5e-6, 1024)
    around = 2 * 5e-6 + 13 * 2e-6  # two of the 15 hops are between the nodes
    assert on_paper.hop_seconds(16, link) == pytest.approx(around)
    # 400 MB, sent twice except for a sixteenth: 750 MB at 50 GB/s
    assert on_paper.sum_seconds(work, 16, link) == pytest.approx(0.015 + 2 * around)
    # 1.9 G weights of two bytes, without the sixteenth on this GPU: 3.5625 GB, in 21 gathers
    assert on_paper.gather_seconds(work, 16, link) == pytest.approx(0.07125 + 21 * around)
    assert work.seconds == pytest.approx(1)
    assert on_paper.ddp_cost(work, 16, link).computing_share == pytest.approx(1 / 1.015, rel=1e-3)
    assert on_paper.fsdp_cost(work, 16, link).computing_share == pytest.approx(
        1 / 1.015, rel=1e-3
    )  # the gathers are hidden
    assert on_paper.hop_seconds(8, link) == pytest.approx(35e-6)


def test_sizes_are_those_of_the_real_models_and_of_the_page():
    page = (PROJECT / "docs" / "measurements" / "scaling.md").read_text(encoding="utf-8")
    work = on_paper.measure_sizes("SDXL", on_paper.sdxl(), on_paper.UNET_ATTENTION)
    assert (work.base, work.blocks) == (2_567_463_684, 90)
    # rank x (inputs + outputs) of q, k, v and out: 70 blocks of self- and of cross-attention
    widths = [640] * 10 + [1280] * 60
    assert work.adapters == sum(16 * (8 * 2 * w - 2 * w + 2 * 2048) for w in widths)
    work = replace(work, flops=17.29e12)
    cells = [str(on_paper.ddp_cost(work, 1024, link)) for link in on_paper.LINKS[2:]]
    assert f"| SDXL DDP | 1024 | - | - | {' | '.join(cells)} |" in page
