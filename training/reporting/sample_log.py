"""A log of the training samples and their noise, one file per process, for comparing runs."""

import hashlib
from pathlib import Path

from torch import Tensor

from data.batches import Batch
from training.reporting.json_lines import JsonLines
from training.run_folder import SAMPLE_LOG


class SampleLog:
    """The samples of one process, one line each."""

    def __init__(self, folder: Path, process_index: int):
        self.lines = JsonLines(folder / SAMPLE_LOG / f"rank_{process_index}.jsonl")

    def add(self, step: int, rows: list[int], batch: Batch) -> None:
        """Add the samples of a batch. `step`: the step that it is part of, counted from 1."""
        samples = zip(batch.visits, rows, batch.quantile.tolist(), batch.noise, strict=True)
        lines = [
            {
                "step": step,
                "visit": visit,
                "row": row,
                "quantile": quantile,
                "noise": tensor_hash(noise),
            }
            for visit, row, quantile, noise in samples
        ]
        self.lines.append(*lines)


def truncate_logs(folder: Path, step: int) -> None:
    """Remove the samples after `step`, which will be seen again, perhaps by other processes."""
    for path in (folder / SAMPLE_LOG).glob("rank_*.jsonl"):
        JsonLines(path).truncate(step)


def tensor_hash(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.numpy().tobytes(), digest_size=8).hexdigest()
