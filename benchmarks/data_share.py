"""Time to read a batch, relative to a training step of a large model on a GPU.

`python benchmarks/data_share.py` reads encoded samples of the size of FLUX.1 and of Wan 14B on one
thread, with their noise. The time of a training step follows from its FLOPs, counted without
weights, at 40 % of an H100's speed. The exit code is 1 if a batch takes over 10 % of a step. Loader
threads read ahead, so this is the share of one CPU core, not a delay.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks.data_growth import write_dataset
from benchmarks.on_paper import FLOPS_PER_SECOND, count_flops, flux, flux_inputs, meta
from data.batches import MicroBatches
from data.schedule import Schedule

BAR = 0.10
ROWS, TURNS, WARM_UP_TURNS = 32, 40, 5
TEXT = (512, 4096)


@dataclass(frozen=True)
class Workload:
    """A model, and a sample of it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    """Returns arguments of the model without data, at batch size 1."""
    media: dict[str, tuple[int, ...]]
    texts: dict[str, tuple[int, ...]]
    """Names and shapes of the stored tensors."""


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        return WanTransformer3DModel()


def wan_inputs() -> dict[str, Any]:
    return {
        "hidden_states": meta(1, 16, 9, 60, 104),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, *TEXT),
    }


WORKLOADS = (
    Workload(
        "FLUX.1, 1024 px",
        flux,
        flux_inputs,
        {"latents": (16, 128, 128)},
        {"pooled": (768,), "prompt_embeds": TEXT},
    ),
    Workload(
        "Wan 14B, 480p, 33 frames",
        wan,
        wan_inputs,
        {"latents": (16, 9, 60, 104)},
        {"prompt_embeds": TEXT},
    ),
)


def seconds_of_batch(work: Workload, turns: int) -> float:
    """Return the median time to read a batch of one sample, with its noise."""
    media = [random_tensors(work.media) for _ in range(ROWS)]
    texts = [random_tensors(work.texts) for _ in range(ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder), ROWS, media, texts, 1024)
        schedule = Schedule(dataset.buckets, dataset.content_hash, 0, 1)
        batches = MicroBatches(dataset, schedule)
        seconds = []
        for turn in range(turns + WARM_UP_TURNS):
            start = time.perf_counter()
            batches[turn]
            seconds.append(time.perf_counter() - start)
    return median(seconds[WARM_UP_TURNS:])


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def seconds_of_step(work: Workload) -> float:
    """Return the time of a step with gradient checkpointing at the assumed speed."""
    model = nn.Module.to(work.build(), torch.bfloat16)
    return count_flops(model, work.inputs()) / FLOPS_PER_SECOND


def main(turns: int = TURNS) -> int:
    """Print a line per model; return 1 if a batch takes too long."""
    torch.set_num_threads(1)
    shares = []
    print(f"{'batch of one sample':28}{'batch ms':>10}{'step ms':>10}{'share':>8}")
    for work in WORKLOADS:
        batch, step = seconds_of_batch(work, turns), seconds_of_step(work)
        shares.append(batch / step)
        print(f"{work.name:28}{1000 * batch:10.2f}{1000 * step:10.0f}{batch / step:8.2%}")
    is_met = max(shares) <= BAR
    print(f"bar {BAR:.0%}: {'ok' if is_met else 'NOT OK'}")
    return int(not is_met)


if __name__ == "__main__":
    sys.exit(main())
