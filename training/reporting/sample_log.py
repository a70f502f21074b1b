"""Which samples a run has seen, and with what noise: a file per rank, to compare runs by."""

import hashlib
from pathlib import Path

from torch import Tensor

from data.batches import Batch
from training.reporting.reporter import JsonLines
from training.run_folder import SAMPLES


class SampleLog:
    """The samples of one rank, a line each."""

    def __init__(self, folder: Path, rank: int):
        self.lines = JsonLines(folder / SAMPLES / f"rank_{rank}.jsonl")

    def add(self, step: int, rows: list[int], batch: Batch) -> None:
        """`step`: the one that `batch` is part of, counted from 1."""
        seen = zip(batch.visits, rows, batch.quantile.tolist(), batch.noise, strict=True)
        self.lines.append(
            *(
                {"step": step, "visit": visit, "row": row, "quantile": quantile, "noise": hash_of(noise)}
                for visit, row, quantile, noise in seen
            )
        )


def cut_all(folder: Path, step: int) -> None:
    """Forgets what came after `step`, which will come again, perhaps on other ranks."""
    for path in (folder / SAMPLES).glob("rank_*.jsonl"):
        JsonLines(path).cut(step)


def hash_of(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.numpy().tobytes(), digest_size=8).hexdigest()
