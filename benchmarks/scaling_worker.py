"""Processes of benchmarks/scaling_rank.py, as benchmarks/scaling.py controls them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
EMOJI = PROJECT / "examples" / "emoji"
OPTIONS = [
    f"--data.path={EMOJI / 'screen_print' / 'train'}",
    "--data.resolution=64",
    "--rank=16",
    "--adapter.targets=attention",
    "--steps=100000",
    "--tracking.log_every=100000",
    "--checkpoint.every=0",
    "--checkpoint.every_minutes=0",
    "--distributed.rank_check_every=0",
    "--no_preview",
    "--no_gradient_checkpointing",
]


class Worker:
    """A process of benchmarks/scaling_rank.py."""

    def __init__(
        self, folder: Path, options: Iterable[str], group: tuple[int, int, int] | None = None
    ):
        """`group`: rank, number of processes, and port."""
        folder.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "TQDM_DISABLE": "1",
        }
        rank = "0"
        if group is not None:
            rank, world_size, port = map(str, group)
            environment |= {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world_size,
                "MASTER_PORT": port,
                "MASTER_ADDR": "127.0.0.1",
                "TORCH_FR_BUFFER_SIZE": "2000",
            }
        self.log = folder / f"log_{rank}.txt"
        argv = [
            sys.executable,
            "-m",
            "benchmarks.scaling_rank",
            *OPTIONS,
            *options,
            f"--output_dir={folder / 'out'}",
            f"--data.cache_dir={folder / 'cache'}",
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                argv, env=environment, cwd=PROJECT, text=True, stdin=-1, stdout=-1, stderr=log
            )

    def request(self, request: int | str) -> None:
        """Send a number of steps, or "save"."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to a request."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            log = self.log.read_text(encoding="utf-8")
            raise RuntimeError(f"a process ended: {log[-2000:]}")
        return json.loads(line)

    def end(self) -> None:
        """Close stdin, which stops the run."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def request_all(workers: list[Worker], request: int | str) -> list[dict[str, Any]]:
    """Send a request to all workers; return their answers."""
    for worker in workers:
        worker.request(request)
    return [worker.answer() for worker in workers]
