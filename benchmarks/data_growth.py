"""Growth of memory and time with the number of rows. Part of benchmarks/data.py."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from benchmarks.memory import peak_memory
from data.batches import MicroBatches
from data.dataset import LatentDataset, Stores
from data.loader import load_micro_batches
from data.media.buckets import Crop
from data.precompute.index import write_index
from data.samples import PlannedSample
from data.schedule import Schedule
from data.store.keys import key_of
from data.store.store import Store
from data.store.tables import Table, new_table

GROWTH_BAR = 1.10
"""With ten times as many rows, relative to the fewer rows."""
NUM_BATCHES = 200
MIB = 2**20
GROWTH_NAMES = {
    "peak": "peak memory",
    "index peak": "peak memory with the index written",
    "first": "time to first batch",
}
Tensors = dict[str, Tensor]


def write_dataset(
    folder: Path, count: int, media: Iterable[Tensors], texts: list[Tensors], side: int
) -> LatentDataset:
    """Write an encoded data set as the trainer does, and open it. Rows after the last text share
    it. `side`: of the images, in pixels."""
    Store(folder / "media").write((key_of(str(n)), row) for n, row in enumerate(media))
    Store(folder / "text").write((key_of(str(n)), row) for n, row in enumerate(texts))
    crop = Crop(side, side, side, side, 0, 0, side, side)
    with new_table(folder / "planned.arrow", PlannedSample) as table:
        for number in range(count):
            key = key_of(str(number))
            table.add(
                PlannedSample(
                    listed=number,
                    content_hash=key,
                    media_keys=[key],
                    caption_keys=[key_of(str(min(number, len(texts) - 1)))],
                    caption_probabilities=[1.0],
                    crop=crop,
                )
            )
    return write_and_open_index(folder)


def write_and_open_index(folder: Path) -> LatentDataset:
    """Write the index of a data set, and open the data set."""
    stores = Stores(Store(folder / "media"), Store(folder / "text"))
    planned = Table(folder / "planned.arrow", PlannedSample)
    write_index(folder / "index", planned, np.arange(len(planned)), stores)
    return LatentDataset(folder / "index", stores)


def write_rows(folder: Path, count: int) -> None:
    """Write rows with small latents and one text for all."""
    media = ({"latents": torch.full((4, 2, 2), float(n))} for n in range(count))
    write_dataset(folder, count, media, [{"prompt_embeds": torch.zeros(77, 64)}], 16)


def use_rows(folder: Path, num_batches: int) -> dict[str, float]:
    """Open the data set of `write_rows` and read batches.

    Return peak memory in MiB, before and after the index is written again as the main process does
    it, and seconds."""
    start = time.perf_counter()
    stores = Stores(Store(folder / "media"), Store(folder / "text"))
    opened_at = time.perf_counter()
    dataset = LatentDataset(folder / "index", stores)
    schedule = Schedule(dataset.buckets, dataset.content_hash, 0, 8)
    batches = load_micro_batches(MicroBatches(dataset, schedule), range(num_batches), 0, False)
    next(batches)
    first_at = time.perf_counter()
    for _ in batches:
        pass
    result = {
        "peak": peak_memory() / MIB,
        "open": opened_at - start,
        "first": first_at - opened_at,
    }
    write_and_open_index(folder)
    return {**result, "index peak": peak_memory() / MIB}


def growth(
    counts: tuple[int, int], rounds: int = 3, batches: int = NUM_BATCHES
) -> list[dict[str, float]]:
    """Return the figures of `use_rows` for each number of rows: medians of processes that take
    turns."""
    results: list[list[dict[str, float]]] = [[] for _ in counts]
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(count) for count in counts]
        for folder, count in zip(folders, counts, strict=True):
            write_rows(folder, count)
        for _ in range(rounds):
            for number, folder in enumerate(folders):
                command = [sys.executable, __file__, str(folder), str(batches)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                results[number].append(json.loads(output))
    return [medians(entries) for entries in results]


def medians(results: list[dict[str, float]]) -> dict[str, float]:
    values = {}
    for name in results[0]:
        values[name] = median(result[name] for result in results)
    return values


def compare_growth(counts: tuple[int, int], rounds: int, batches: int = NUM_BATCHES) -> bool:
    """Print the figures of two numbers of rows and a line per bar; return whether all are met."""
    results = growth(counts, rounds, batches)
    header = f"{'peak MiB':>10}{'and index written':>19}{'stores opened ms':>18}"
    print(f"\n{'':10}{header}{'first batch ms':>16}")
    for count, result in zip(counts, results, strict=True):
        memory = f"{result['peak']:10.1f}{result['index peak']:19.1f}"
        times = f"{result['open'] * 1000:18.1f}{result['first'] * 1000:16.2f}"
        print(f"{count:<10,}{memory}{times}")
    are_all_met = True
    fewer_rows, more_rows = results
    for key, name in GROWTH_NAMES.items():
        ratio = more_rows[key] / fewer_rows[key]
        is_met = ratio <= GROWTH_BAR
        are_all_met = are_all_met and is_met
        print(f"{name}: {ratio:.3f}, bar {GROWTH_BAR:.2f}: {'ok' if is_met else 'NOT OK'}")
    return are_all_met


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(use_rows(Path(sys.argv[1]), int(sys.argv[2]))))
