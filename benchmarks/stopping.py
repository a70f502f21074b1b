"""Time from a SIGTERM to a saved run, on the demo as a user starts it. Part of
benchmarks/scaling.py."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.bars import Bar

PROJECT = Path(__file__).resolve().parent.parent
DEMO = PROJECT / "recipes" / "demo.yaml"
BAR_SECONDS = 10.0
STOP_STEP = '"step": 5,'
"""In metrics.jsonl; the signal is sent after this step."""


def time_stop(launcher: list[str], folder: Path, moment: str) -> float:
    """Return the seconds from a SIGTERM to "saved step". `moment`: "validation" or "training"."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    argv = [
        *launcher,
        str(PROJECT / "train_lora.py"),
        str(DEMO),
        f"--output_dir={folder / 'out'}",
        f"--data.cache_dir={folder / 'cache'}",
        "--tracking.log_every=1",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONUNBUFFERED": "1",
    }
    log = folder / "log.txt"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            argv,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
    assert process.stdout is not None
    lines = iter(process.stdout)
    try:
        # the last line of the summary; the first validation follows it
        next(line for line in lines if line.startswith("output "))
        if moment == "training":
            wait_for_step(folder / "out" / "metrics.jsonl")
        begin = time.monotonic()
        process.terminate()
        next(line for line in lines if "saved step" in line)
        return time.monotonic() - begin
    except StopIteration:
        raise RuntimeError(f"the demo ended: {log.read_text(encoding='utf-8')[-2000:]}") from None
    finally:
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_step(metrics: Path) -> None:
    """Wait until the metrics of a few steps are written."""
    while not metrics.exists() or STOP_STEP not in metrics.read_text(encoding="utf-8"):
        time.sleep(0.01)


def measure(folder: Path, rounds: int) -> Bar:
    """Print a table of the times; return the bar."""
    accelerate = str(Path(sys.executable).parent / "accelerate")
    ddp_config = str(PROJECT / "accelerate_configs" / "ddp.yaml")
    launchers = {
        "python": [sys.executable],
        "accelerate launch, 2 ranks": [accelerate, "launch", "--config_file", ddp_config],
    }
    print(f"\nSIGTERM to 'saved' on the demo, s, median and maximum of {rounds}")
    longest = 0.0
    for name, launcher in launchers.items():
        for moment in ("validation", "training"):
            seconds = [time_stop(launcher, folder, moment) for _ in range(rounds)]
            longest = max(longest, *seconds)
            print(f"{name:28}{moment:12}{median(seconds):8.2f}{max(seconds):8.2f}", flush=True)
    text = f"SIGTERM to saved: {longest:.2f} s at most, bar {BAR_SECONDS:g}"
    return Bar(text, longest <= BAR_SECONDS, depends_on_time=True)
