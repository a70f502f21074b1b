"""How long after a SIGTERM a run is on the disk, on the demo as a user starts it. Part of
benchmarks/scaling.py."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

PROJECT = Path(__file__).resolve().parent.parent
DEMO = PROJECT / "recipes" / "demo.yaml"
BAR = 10.0  # seconds


def stop(launcher: list[str], folder: Path, moment: str) -> float:
    """Seconds from a SIGTERM to the demo's launcher to "saved", in validation or in training."""
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
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            argv,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        rest = iter(process.stdout)
        next(
            line for line in rest if line.startswith("output ")
        )  # of the summary; the first validation follows it
        metrics = folder / "out" / "metrics.jsonl"
        while moment == "training" and (
            not metrics.exists() or '"step": 5,' not in metrics.read_text()
        ):
            time.sleep(0.01)
        begin = time.monotonic()
        process.terminate()
        next(line for line in rest if "saved step" in line)
        return time.monotonic() - begin
    except StopIteration:
        raise RuntimeError(
            f"the demo ended: {(folder / 'log.txt').read_text(encoding='utf-8')[-2000:]}"
        ) from None
    finally:
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def stops(folder: Path, rounds: int) -> list[tuple[str, bool, bool]]:
    """Prints a table of `stop`; returns the bar."""
    accelerate = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file"]
    launchers = {
        "python": [sys.executable],
        "accelerate launch, 2 ranks": [
            *accelerate,
            str(PROJECT / "accelerate_configs" / "ddp.yaml"),
        ],
    }
    print(f"\nSIGTERM to 'saved' on the demo, s, median and most of {rounds}")
    longest = 0.0
    for name, launcher in launchers.items():
        for moment in ("validation", "training"):
            seconds = [stop(launcher, folder, moment) for _ in range(rounds)]
            longest = max(longest, *seconds)
            print(f"{name:28}{moment:12}{median(seconds):8.2f}{max(seconds):8.2f}", flush=True)
    return [(f"SIGTERM to saved: {longest:.2f} s at most, bar {BAR:g}", longest <= BAR, True)]
