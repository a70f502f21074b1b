"""benchmarks/data.py: it runs, and ten times as many rows take no more memory."""

import pytest

from benchmarks import data as bench
from benchmarks import data_growth, data_share


def test_the_table_has_a_line_for_every_reader_and_every_bar(capsys):
    bench.main(["--tiny"])  # so few rows and turns say nothing about the bars
    lines = capsys.readouterr().out.splitlines()
    for name in (bench.COPY, bench.OURS, bench.OURS_STORED, bench.WORKER):
        assert len([line for line in lines if line.startswith(f"{name}  ")]) == 1, name
    assert len([line for line in lines if ", bar " in line]) == 5


def test_ten_times_the_rows_take_no_more_memory():
    few, many = data_growth.growth((2_000, 20_000), rounds=1, batches=100)
    assert many["peak"] <= data_growth.GROWTH_BAR * few["peak"]
    assert many["first"] <= 5 * few["first"] + 0.1, (
        "a first batch that reads all rows would take far longer"
    )


@pytest.mark.long
def test_a_batch_takes_a_small_share_of_a_step_on_a_gpu(capsys):
    assert data_share.main(turns=3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[1:3]] == ["FLUX.1", "Wan 14B"]
