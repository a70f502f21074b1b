"""How fast batches are read, against plain copies of the same bytes, and what more rows take:
memory and time.

`python benchmarks/data.py` prints GB/s for rows of SDXL's size (latents 4x128x128, pooled 1280 and
prompt embeddings 77x2048, all bf16; noise fp32), then peak memory and time to the first batch with
10,000 and 100,000 rows, and a line per bar; it exits with 1 if one is missed. All ways of reading
take turns in one process on one thread, on files that are in the page cache. `--tiny` runs in
seconds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: two threads on two busy cores wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from benchmarks.memory import peak_memory
from data import batches as data_batches
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

BAR, GROWTH_BAR = 0.40, 1.10
BATCHES, WARM_UP = 200, 5
LATENTS, POOLED, PROMPT = (4, 128, 128), (1280,), (77, 2048)
COPY, STORED_COPY = "memcpy into a new batch, with noise", "memcpy into a new batch, no noise"
OURS, OURS_STORED, WORKER = (
    "ours, with noise",
    "ours, no noise",
    "ours, with noise, through one worker",
)
BARS = {
    "peak": "peak memory",
    "index peak": "peak memory with the index written",
    "first": "time to first batch",
}
Tensors = dict[str, Tensor]


@dataclass
class Way:
    """A way to get a batch: the bytes that count, and seconds of each turn, by the clock and of CPU
    time."""

    name: str
    batch: Callable[[int], object]
    size: int
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def encoded(
    folder: Path, count: int, media: Iterable[Tensors], texts: list[Tensors], side: int
) -> LatentDataset:
    """A data set of ours, through the stores, the table of rows and the index, as the pipeline makes them; the rows
    beyond the last of the texts share it."""
    Store(folder / "media").write((key_of(str(n)), row) for n, row in enumerate(media))
    Store(folder / "text").write((key_of(str(n)), row) for n, row in enumerate(texts))
    crop = Crop(side, side, side, side, 0, 0, side, side)
    with new_table(folder / "planned.arrow", PlannedSample) as table:
        for n in range(count):
            table.add(
                PlannedSample(
                    listed=n,
                    content_hash=key_of(str(n)),
                    media_keys=[key_of(str(n))],
                    caption_keys=[key_of(str(min(n, len(texts) - 1)))],
                    caption_probabilities=[1.0],
                    crop=crop,
                )
            )
    return indexed(folder)


def indexed(folder: Path) -> LatentDataset:
    stores = Stores(Store(folder / "media"), Store(folder / "text"))
    planned = Table(folder / "planned.arrow", PlannedSample)
    write_index(folder / "index", planned, np.arange(len(planned)), stores)
    return LatentDataset(folder / "index", stores)


def sdxl(count: int) -> tuple[list[Tensors], list[Tensors]]:
    media = [{"latents": torch.randn(LATENTS).bfloat16()} for _ in range(count)]
    texts = [
        {"pooled": torch.randn(POOLED).bfloat16(), "prompt_embeds": torch.randn(PROMPT).bfloat16()}
        for _ in media
    ]
    return media, texts


def nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def copying(source: Tensors, batch_size: int, fresh: bool) -> Callable[[int], object]:
    """torch's copy_, which is memcpy, of consecutive rows of tensors as large as the whole data
    set."""
    count = len(next(iter(source.values())))
    kept = {name: torch.empty_like(tensor[:batch_size]) for name, tensor in source.items()}

    def batch(turn: int) -> Tensors:
        first = turn * batch_size % (count - batch_size + 1)
        into = {name: torch.empty_like(tensor) for name, tensor in kept.items()} if fresh else kept
        for name, tensor in into.items():
            tensor.copy_(source[name][first : first + batch_size])
        return into

    return batch


def without_noise(batches: MicroBatches) -> Callable[[int], object]:
    def batch(turn: int) -> object:
        drawn, data_batches.standard_normal = (
            data_batches.standard_normal,
            lambda shape, generators: None,
        )
        try:
            return batches[turn]
        finally:
            data_batches.standard_normal = drawn

    return batch


def through_worker(dataset: LatentDataset, batch_size: int, turns: int) -> Way:
    """One after the other as fast as the worker makes them: in turns with others it would have time
    to make them."""
    schedule = Schedule(dataset.buckets, dataset.content_hash, 0, batch_size)
    loader = load_micro_batches(
        MicroBatches(dataset, schedule), range(turns + WARM_UP), 1, pin_memory=False
    )
    kept, way = next(loader), Way(WORKER, lambda turn: next(loader), 0)
    way.size = kept.noise.nbytes + kept.latents.nbytes + nbytes(kept.cond)
    take_turns([way], turns)
    return way


def through_arrow(
    folder: Path, rows: list[Tensors], batch_size: int, half: bool
) -> Callable[[int], object]:
    """`datasets` with Array features; Arrow has no bf16."""
    import datasets

    dtype, torch_dtype = ("float16", torch.float16) if half else ("float32", torch.float32)
    features = datasets.Features(
        {
            "latents": datasets.Array3D(LATENTS, dtype),
            "prompt_embeds": datasets.Array2D(PROMPT, dtype),
            "pooled": datasets.List(datasets.Value(dtype), POOLED[0]),
        }
    )
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_generator(
        lambda: (
            {name: tensor.to(torch_dtype).numpy() for name, tensor in row.items()} for row in rows
        ),
        features=features,
        cache_dir=str(folder / f"arrow-{dtype}"),
    ).with_format("torch")
    return lambda turn: made[picked(turn, batch_size, len(rows))]


def through_files(folder: Path, rows: list[Tensors], batch_size: int) -> Callable[[int], object]:
    """A .pt file per row, stacked."""
    folder.mkdir()
    for n, row in enumerate(rows):
        torch.save(row, folder / f"{n}.pt")

    def batch(turn: int) -> Tensors:
        read = [
            torch.load(folder / f"{n}.pt", weights_only=True)
            for n in picked(turn, batch_size, len(rows))
        ]
        return {name: torch.stack([row[name] for row in read]) for name in read[0]}

    return batch


def picked(turn: int, batch_size: int, count: int) -> list[int]:
    """Rows all over the data set."""
    return [(turn * batch_size + i) * 7 % count for i in range(batch_size)]


def ways(folder: Path, count: int, batch_size: int, turns: int) -> list[Way]:
    media, texts = sdxl(count)
    rows = [{**a, **b} for a, b in zip(media, texts, strict=True)]
    dataset = encoded(folder / "ours", count, media, texts, 1024)
    schedule = Schedule(dataset.buckets, dataset.content_hash, 0, batch_size)
    batches = MicroBatches(dataset, schedule)
    stored = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    delivered = {**stored, "noise": torch.randn(count, *LATENTS)}
    size, full = (nbytes(tensors) * batch_size // count for tensors in (stored, delivered))
    compared = [
        Way(COPY, copying(delivered, batch_size, fresh=True), full),
        Way(
            "memcpy into the same batch, with noise",
            copying(delivered, batch_size, fresh=False),
            full,
        ),
        Way(STORED_COPY, copying(stored, batch_size, fresh=True), size),
        Way(OURS, batches.__getitem__, full),
        Way(OURS_STORED, without_noise(batches), size),
        Way("torch.randn of the noise alone", drawing(batch_size), full - size),
        Way(
            ".pt files, torch.load, no noise", through_files(folder / "pt", rows, batch_size), size
        ),
        Way(
            "datasets, Array features fp16, no noise",
            through_arrow(folder, rows, batch_size, True),
            size,
        ),
        Way(
            "datasets, Array features fp32, no noise",
            through_arrow(folder, rows, batch_size, False),
            2 * size,
        ),
    ]
    take_turns(compared, turns)
    return [*compared, through_worker(dataset, batch_size, turns)]


def drawing(batch_size: int) -> Callable[[int], object]:
    into, generator = torch.empty(batch_size, *LATENTS), torch.Generator().manual_seed(0)
    return lambda turn: [torch.randn(LATENTS, generator=generator, out=one) for one in into]


def take_turns(compared: list[Way], turns: int) -> None:
    """Turns that are not timed, then `turns`; each way keeps its last batch until it has the next."""
    kept: dict[str, object] = {}
    for turn in range(turns + WARM_UP - 1):
        for way in compared:
            clock, cpu = time.perf_counter(), time.process_time()
            kept[way.name] = way.batch(turn)
            way.cpu.append(time.process_time() - cpu)
            way.seconds.append(time.perf_counter() - clock)
    for way in compared:
        way.seconds, way.cpu = way.seconds[-turns:], way.cpu[-turns:]


def speeds(count: int, batch_size: int, turns: int) -> bool:
    """Prints the table; whether the bar is met."""
    with tempfile.TemporaryDirectory() as name:
        compared = ways(Path(name), count, batch_size, turns)
    rate = {way.name: way.size / median(way.seconds) / 1e9 for way in compared}
    print(
        f"{count} rows of SDXL's size, batches of {batch_size}, one thread, medians of {turns} turns"
    )
    print(f"{'':42}{'MB':>7}{'ms':>9}{'CPU ms':>9}{'GB/s':>8}{'of memcpy':>11}")
    for way in compared:
        copy = rate[STORED_COPY if "no noise" in way.name else COPY]
        times = f"{median(way.seconds) * 1000:9.2f}{median(way.cpu) * 1000:9.2f}"
        print(
            f"{way.name:42}{way.size / 1e6:7.2f}{times}{rate[way.name]:8.2f}{rate[way.name] / copy:10.1%}"
        )
    print(
        "Arrow has no bf16: fp16 is as many bytes, fp32 twice as many. CPU ms: of the process and its worker"
    )
    met = []
    for ours, copy in ((OURS, COPY), (OURS_STORED, STORED_COPY)):
        met.append(rate[ours] / rate[copy] >= BAR)
        print(
            f"{ours}: {rate[ours] / rate[copy]:.1%} of memcpy, bar {BAR:.0%}: {'ok' if met[-1] else 'NOT OK'}"
        )
    return met[0]


def make_rows(folder: Path, count: int) -> None:
    """Rows with small latents and one text for all."""
    media = ({"latents": torch.full((4, 2, 2), float(n))} for n in range(count))
    encoded(folder, count, media, [{"prompt_embeds": torch.zeros(77, 64)}], 16)


def use_rows(folder: Path, batches: int) -> dict[str, float]:
    """Opens what `make_rows` made and reads batches; returns peak memory in MiB, before and after the index is written
    again as the first rank does it, and seconds."""
    start = time.perf_counter()
    stores = Stores(Store(folder / "media"), Store(folder / "text"))
    opened = time.perf_counter()
    dataset = LatentDataset(folder / "index", stores)
    numbers = load_micro_batches(
        MicroBatches(dataset, Schedule(dataset.buckets, dataset.content_hash, 0, 8)),
        range(batches),
        0,
        False,
    )
    next(numbers)
    first = time.perf_counter()
    for _ in numbers:
        pass
    result = {"peak": peak_memory() / 2**20, "open": opened - start, "first": first - opened}
    indexed(folder)
    return {**result, "index peak": peak_memory() / 2**20}


def growth(
    counts: tuple[int, int], rounds: int = 3, batches: int = BATCHES
) -> list[dict[str, float]]:
    """For each number of rows the medians of processes of their own, which take turns."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(count) for count in counts]
        for folder, count in zip(folders, counts, strict=True):
            make_rows(folder, count)
        found: list[list[dict[str, float]]] = [[], []]
        for _ in range(rounds):
            for folder, results in zip(folders, found, strict=True):
                command = [sys.executable, __file__, f"--use={folder}", f"--batches={batches}"]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                results.append(json.loads(output))
    return [
        {name: median(result[name] for result in results) for name in results[0]}
        for results in found
    ]


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables and a line per bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="few rows and turns")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--use", help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=BATCHES, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.use:
        print(json.dumps(use_rows(Path(given.use), given.batches)))
        return 0
    met = [speeds(*((16, 2, 3) if given.tiny else (256, 8, given.turns)))]
    counts = (200, 2000) if given.tiny else (10_000, 100_000)
    few, many = growth(counts, 1 if given.tiny else 5, 20 if given.tiny else BATCHES)
    print(
        f"\n{'':10}{'peak MiB':>10}{'and index written':>19}{'stores opened ms':>18}{'first batch ms':>16}"
    )
    for count, result in zip(counts, (few, many), strict=True):
        times = f"{result['open'] * 1000:18.1f}{result['first'] * 1000:16.2f}"
        print(f"{count:<10,}{result['peak']:10.1f}{result['index peak']:19.1f}{times}")
    for name, what in BARS.items():
        ratio = many[name] / few[name]
        met.append(ratio <= GROWTH_BAR)
        print(f"{what}: {ratio:.3f}, bar {GROWTH_BAR:.2f}: {'ok' if met[-1] else 'NOT OK'}")
    return int(not all(met))


if __name__ == "__main__":
    sys.exit(main())
