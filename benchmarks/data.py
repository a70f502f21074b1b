"""Speed of reading batches relative to plain copies, and growth of memory and time with the
number of rows.

`python benchmarks/data.py` prints GB/s for rows of SDXL's size: latents 4x128x128, pooled 1280
and prompt embeddings 77x2048, all bf16, and fp32 noise. Then it prints peak memory and the time
to the first batch with 10,000 and 100,000 rows, and a line per bar. The exit code is 1 if a bar
is missed. All readers take turns in one process on one thread, on files that are in the page
cache. `--tiny` takes seconds.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

# set before torch is imported: two threads on two busy cores wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.data_growth import Tensors, compare_growth, write_dataset
from data import batches as data_batches
from data.batches import MicroBatches
from data.dataset import LatentDataset
from data.loader import load_micro_batches
from data.schedule import Schedule

SPEED_BAR = 0.40
"""GB/s relative to memcpy."""
WARM_UP_TURNS = 5
LATENTS, POOLED, PROMPT = (4, 128, 128), (1280,), (77, 2048)
COPY, STORED_COPY = "memcpy into a new batch, with noise", "memcpy into a new batch, no noise"
OURS, OURS_STORED = "ours, with noise", "ours, no noise"
WORKER = "ours, with noise, through one worker"


@dataclass
class Reader:
    """A way to get a batch."""

    name: str
    read_batch: Callable[[int], object]
    """Called with the number of the turn."""
    num_bytes: int
    """Size of a batch."""
    seconds: list[float] = field(default_factory=list)
    """Clock time of each turn."""
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def gb_per_second(self) -> float:
        return self.num_bytes / median(self.seconds) / 1e9


def sdxl_tensors(count: int) -> tuple[list[Tensors], list[Tensors]]:
    """Return random media and texts of SDXL's size."""
    media = [{"latents": torch.randn(LATENTS).bfloat16()} for _ in range(count)]
    texts = [
        {"pooled": torch.randn(POOLED).bfloat16(), "prompt_embeds": torch.randn(PROMPT).bfloat16()}
        for _ in media
    ]
    return media, texts


def total_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def copy_reader(source: Tensors, batch_size: int, is_new: bool) -> Callable[[int], object]:
    """Copy consecutive rows of tensors that hold the whole data set, by torch's copy_, which is
    memcpy. `is_new`: into new tensors."""
    count = len(next(iter(source.values())))
    reused = {name: torch.empty_like(tensor[:batch_size]) for name, tensor in source.items()}

    def read_batch(turn: int) -> Tensors:
        first = turn * batch_size % (count - batch_size + 1)
        batch = reused
        if is_new:
            batch = {name: torch.empty_like(tensor) for name, tensor in reused.items()}
        for name, tensor in batch.items():
            tensor.copy_(source[name][first : first + batch_size])
        return batch

    return read_batch


def no_noise(shape: object, generators: object) -> None:
    """Replace `standard_normal` of data/batches.py."""


def reader_without_noise(batches: MicroBatches) -> Callable[[int], object]:
    """Read batches without drawing noise."""

    def read_batch(turn: int) -> object:
        draw = data_batches.standard_normal
        data_batches.standard_normal = no_noise  # unittest.mock would take as long as a small batch
        try:
            return batches[turn]
        finally:
            data_batches.standard_normal = draw

    return read_batch


def worker_reader(dataset: LatentDataset, batch_size: int, turns: int) -> Reader:
    """Measure batches of a worker, one after another.

    In turns with other readers the worker would have time to prepare them."""
    schedule = Schedule(dataset.buckets, dataset.content_hash, 0, batch_size)
    loader = load_micro_batches(
        MicroBatches(dataset, schedule), range(turns + WARM_UP_TURNS), 1, pin_memory=False
    )
    batch = next(loader)
    num_bytes = batch.noise.nbytes + batch.latents.nbytes + total_bytes(batch.cond)
    reader = Reader(WORKER, lambda turn: next(loader), num_bytes)
    take_turns([reader], turns)
    return reader


def arrow_reader(
    folder: Path, rows: list[Tensors], batch_size: int, dtype: torch.dtype
) -> Callable[[int], object]:
    """Read through `datasets` with Array features. Arrow has no bf16."""
    import datasets

    dtype_name = str(dtype).removeprefix("torch.")
    features = datasets.Features(
        {
            "latents": datasets.Array3D(LATENTS, dtype_name),
            "prompt_embeds": datasets.Array2D(PROMPT, dtype_name),
            "pooled": datasets.List(datasets.Value(dtype_name), POOLED[0]),
        }
    )

    def examples() -> Iterator[dict[str, np.ndarray]]:
        for row in rows:
            yield {name: tensor.to(dtype).numpy() for name, tensor in row.items()}

    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_generator(
        examples, features=features, cache_dir=str(folder / f"arrow-{dtype_name}")
    ).with_format("torch")
    return lambda turn: dataset[scattered_rows(turn, batch_size, len(rows))]


def file_reader(folder: Path, rows: list[Tensors], batch_size: int) -> Callable[[int], object]:
    """Read a .pt file per row, and stack them."""
    folder.mkdir()
    for number, row in enumerate(rows):
        torch.save(row, folder / f"{number}.pt")

    def read_batch(turn: int) -> Tensors:
        numbers = scattered_rows(turn, batch_size, len(rows))
        examples = [torch.load(folder / f"{n}.pt", weights_only=True) for n in numbers]
        return stack_rows(examples)

    return read_batch


def stack_rows(rows: list[Tensors]) -> Tensors:
    stacked = {}
    for name in rows[0]:
        stacked[name] = torch.stack([row[name] for row in rows])
    return stacked


def scattered_rows(turn: int, batch_size: int, count: int) -> list[int]:
    """Return numbers of rows from all over the data set."""
    return [(turn * batch_size + i) * 7 % count for i in range(batch_size)]


def noise_reader(batch_size: int) -> Callable[[int], object]:
    """Draw noise without reading a batch."""
    noise = torch.empty(batch_size, *LATENTS)
    generator = torch.Generator().manual_seed(0)
    return lambda turn: [torch.randn(LATENTS, generator=generator, out=row) for row in noise]


def measure_readers(folder: Path, count: int, batch_size: int, turns: int) -> list[Reader]:
    """Return all readers, measured on a data set of `count` rows."""
    media, texts = sdxl_tensors(count)
    rows = [{**a, **b} for a, b in zip(media, texts, strict=True)]
    dataset = write_dataset(folder / "ours", count, media, texts, 1024)
    schedule = Schedule(dataset.buckets, dataset.content_hash, 0, batch_size)
    batches = MicroBatches(dataset, schedule)
    stored = stack_rows(rows)
    with_noise = {**stored, "noise": torch.randn(count, *LATENTS)}
    size = total_bytes(stored) * batch_size // count
    full_size = total_bytes(with_noise) * batch_size // count
    reused_copy = copy_reader(with_noise, batch_size, is_new=False)
    fp16_arrow = arrow_reader(folder, rows, batch_size, torch.float16)
    fp32_arrow = arrow_reader(folder, rows, batch_size, torch.float32)
    readers = [
        Reader(COPY, copy_reader(with_noise, batch_size, is_new=True), full_size),
        Reader("memcpy into the same batch, with noise", reused_copy, full_size),
        Reader(STORED_COPY, copy_reader(stored, batch_size, is_new=True), size),
        Reader(OURS, batches.__getitem__, full_size),
        Reader(OURS_STORED, reader_without_noise(batches), size),
        Reader("torch.randn of the noise alone", noise_reader(batch_size), full_size - size),
        Reader(
            ".pt files, torch.load, no noise", file_reader(folder / "pt", rows, batch_size), size
        ),
        Reader("datasets, Array features fp16, no noise", fp16_arrow, size),
        Reader("datasets, Array features fp32, no noise", fp32_arrow, 2 * size),
    ]
    take_turns(readers, turns)
    return [*readers, worker_reader(dataset, batch_size, turns)]


def take_turns(readers: list[Reader], turns: int) -> None:
    """Let the readers read in turns; the first turns are not timed. Each reader keeps its last
    batch until it has the next one."""
    last_batches: dict[str, object] = {}
    for turn in range(turns + WARM_UP_TURNS - 1):
        for reader in readers:
            clock, cpu = time.perf_counter(), time.process_time()
            last_batches[reader.name] = reader.read_batch(turn)
            reader.cpu_seconds.append(time.process_time() - cpu)
            reader.seconds.append(time.perf_counter() - clock)
    for reader in readers:
        reader.seconds = reader.seconds[-turns:]
        reader.cpu_seconds = reader.cpu_seconds[-turns:]


def compare_speeds(count: int, batch_size: int, turns: int) -> bool:
    """Print the table of readers and two bars; return whether the bar with noise is met."""
    with tempfile.TemporaryDirectory() as name:
        readers = measure_readers(Path(name), count, batch_size, turns)
    rates = {reader.name: reader.gb_per_second for reader in readers}
    print(
        f"{count} rows of SDXL's size, batches of {batch_size}, one thread, medians of {turns} "
        "turns"
    )
    print(f"{'':42}{'MB':>7}{'ms':>9}{'CPU ms':>9}{'GB/s':>8}{'of memcpy':>11}")
    for reader in readers:
        copy_rate = rates[STORED_COPY if "no noise" in reader.name else COPY]
        rate = rates[reader.name]
        milliseconds = median(reader.seconds) * 1000
        cpu_milliseconds = median(reader.cpu_seconds) * 1000
        times = f"{milliseconds:9.2f}{cpu_milliseconds:9.2f}"
        size = f"{reader.num_bytes / 1e6:7.2f}"
        print(f"{reader.name:42}{size}{times}{rate:8.2f}{rate / copy_rate:10.1%}")
    print(
        "Arrow has no bf16: fp16 has as many bytes, fp32 twice as many. CPU ms: of the process and "
        "its worker"
    )
    results = []
    for ours, copy in ((OURS, COPY), (OURS_STORED, STORED_COPY)):
        ratio = rates[ours] / rates[copy]
        is_met = ratio >= SPEED_BAR
        results.append(is_met)
        verdict = "ok" if is_met else "NOT OK"
        print(f"{ours}: {ratio:.1%} of memcpy, bar {SPEED_BAR:.0%}: {verdict}")
    return results[0]


def main(arguments: list[str] | None = None) -> int:
    """Print the tables and a line per bar; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="few rows and turns")
    parser.add_argument("--turns", type=int, default=60, help="timed batches of each reader")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.tiny:
        is_fast = compare_speeds(16, 2, 3)
        is_bounded = compare_growth((200, 2000), 1, 20)
    else:
        is_fast = compare_speeds(256, 8, options.turns)
        is_bounded = compare_growth((10_000, 100_000), 5)
    return int(not (is_fast and is_bounded))


if __name__ == "__main__":
    sys.exit(main())
