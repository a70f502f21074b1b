"""What an adapter costs on one layer, ours against PEFT's and LyCORIS', in time and in what is kept
for the backward.

`python benchmarks/adapters.py` prints a table per layer and a line per bar, and exits with 1 if one
is missed. All implementations take turns in one process on one thread. Time is CPU time of forward
and backward, as a ratio to that of the frozen layer without adapter, whose backward makes the
gradient of its input alone. LyCORIS is optional: `pip install lycoris-lora==4.1.3`. `--unet`
measures a whole Stable Diffusion 1.5 UNet instead (benchmarks/unet.py).
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: two threads on two busy cores wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.implementations import (
    PEERS,
    SETTINGS,
    UNAVAILABLE,
    Layer,
    Setting,
    Unsupported,
    ours,
    quiet,
)
from lora_algos import ALGORITHMS
from lora_algos.config import LayerSpec

MIB = 2**20
OURS, COLUMNS = "ours", ("ours", *PEERS)


@dataclass(frozen=True)
class Cell:
    """A layer and its input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    repeats: int = 11


CELLS = {
    "Linear 1280": Cell(lambda: nn.Linear(1280, 1280), (2, 1024, 1280)),
    "Conv 320 3x3": Cell(lambda: nn.Conv2d(320, 320, 3, padding=1), (2, 320, 32, 32)),
    "Linear 4096": Cell(lambda: nn.Linear(4096, 4096), (1, 1024, 4096), 3),
}
TINY = {
    "Linear 64": Cell(lambda: nn.Linear(64, 64), (2, 8, 64), 1),
    "Conv 64 3x3": Cell(lambda: nn.Conv2d(64, 64, 3, padding=1), (2, 64, 4, 4), 1),
}
TIME_BARS = {
    ("LoRA r16", "Linear 1280"): 1.08,
    ("LoRA r16", "Conv 320 3x3"): 1.18,
    ("LoRA r16", "Linear 4096"): 1.06,
    ("DoRA r16", "Linear 1280"): 1.12,
    ("LoHa r8", "Linear 1280"): 1.22,
    ("LoHa r16", "Linear 1280"): 1.50,
    ("LoHa r8", "Linear 4096"): 1.06,
    ("LoKr full f8", "Linear 1280"): 1.22,
    ("LoKr f8 r16", "Linear 1280"): 1.15,
    ("LoKr f8 r16", "Linear 4096"): 1.06,
    ("OFT b32", "Linear 1280"): 1.15,
    ("OFT b32", "Conv 320 3x3"): 1.10,
    ("OFT b32", "Linear 4096"): 1.06,
}
KEEPS = {
    "OFT": ("output",),
    "BOFT": ("output",),
    "DoRA": ("input", "output"),
}  # the others the input alone
KEPT_BAR, KEPT_BAR_CELL = 0.15, "Linear 1280"  # MiB beyond that


@dataclass
class Result:
    """What one implementation of a setting took on a cell, turn by turn."""

    saved: float = 0.0
    mode: str = ""
    missing: str = ""
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ratio:
    """The median over turns of one time over another's in the same turn, and two standard errors of
    that median."""

    value: float
    noise: float

    @classmethod
    def of(cls, above: list[float], below: list[float]) -> "Ratio":
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        if len(ratios) < 2:
            return cls(ratios[0], float("inf"))
        low, _, high = quantiles(ratios, n=4, method="inclusive")
        return cls(median(ratios), 2 * 1.253 * (high - low) / 1.349 / len(ratios) ** 0.5)


def saved_bytes(call: Callable[[], object], modules: list[nn.Module]) -> int:
    """The storages that autograd keeps for the backward pass of `call`, each once, without
    parameters."""
    parameters = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = call()  # alive until counted, so that no address is used twice
    del kept
    return sum(seen.values())


def implementations(setting: Setting, base: nn.Module) -> Iterator[tuple[str, Layer | str]]:
    """Each column and its layer, or why there is none. All share the weights of `base`."""
    for column, build in {OURS: ours, **PEERS}.items():
        try:
            if column.startswith("LyCORIS") and UNAVAILABLE:
                raise Unsupported(UNAVAILABLE)
            with quiet():
                layer = build(setting, base)
        except (Unsupported, ValueError, NotImplementedError) as error:
            yield column, " ".join(str(error).split())
            continue
        with torch.no_grad():
            for parameter in layer.trained:
                parameter += 0.01 * torch.randn_like(parameter)  # what is zero at first too
        yield column, layer


def measure(cell: Cell, setting: Setting, repeats: int) -> tuple[dict[str, Result], Result]:
    """The results of all implementations, and of the floor, in the order of the turns."""
    torch.manual_seed(0)
    base = cell.make().requires_grad_(False)
    x = torch.randn(cell.shape, requires_grad=True)
    grad = torch.randn_like(base(x))
    layers, results = {"": Layer(base, [])}, {"": Result()}
    for column, layer in implementations(setting, base):
        results[column] = (
            Result(missing=layer) if isinstance(layer, str) else Result(mode=layer.mode(x))
        )
        if isinstance(layer, Layer):
            layers[column] = layer
    for column, layer in layers.items():
        results[column].saved = (
            saved_bytes(lambda call=layer.module: call(x), [base, layer.module]) / MIB
        )
    for turn in range(-1, repeats):
        order = list(layers)
        shift = turn % len(order)
        for column in order[shift:] + order[:shift]:
            layer = layers[column]
            start = time.process_time()
            torch.autograd.grad(layer.module(x), [x, *layer.trained], grad)
            seconds = time.process_time() - start
            if turn >= 0:  # the first turn warms up
                results[column].seconds.append(seconds)
    return results, results.pop("")


class Table:
    """Prints a cell's rows as they are measured, then the footnotes."""

    def __init__(self, name: str, note: str, timed: bool = True):
        self.notes: list[str] = []
        print(f"\n{name}: {note}")
        print(f"{'':14}" + "".join(f"{column:>24}" for column in COLUMNS))
        print(f"{'':14}" + f"{'time' if timed else '':>18}{'MiB':>6}" * len(COLUMNS), flush=True)

    def row(self, name: str, results: dict[str, Result], floor: Result | None) -> None:
        cells, modes = [], []
        for column in COLUMNS:
            result = results[column]
            if result.missing:
                cells.append(f"{f'- {self._note(result.missing)}':>24}")
                continue
            ratio = Ratio.of(result.seconds, floor.seconds) if floor else None
            shown = f"{ratio.value:.3f} +-{ratio.noise:.3f}" if ratio else ""
            cells.append(f"{shown:>18}{result.saved:6.1f}")
            modes.append(result.mode)
        print(f"{name:14}" + "".join(cells) + f"  {modes[0] if modes else ''}", flush=True)

    def _note(self, text: str) -> str:
        if text not in self.notes:
            self.notes.append(text)
        return f"[{self.notes.index(text) + 1}]"

    def end(self) -> None:
        for number, text in enumerate(self.notes, 1):
            print(f"  [{number}] {text}")


def verdicts(
    cell_name: str, cell: Cell, setting: Setting, results: dict[str, Result], floor: Result
) -> Iterator[tuple[str, str]]:
    """(status, what) for every bar on a row; "even": slower than a peer by less than the noise."""
    judged = {True: "met", False: "MISSED"}
    mine, what = results[OURS], f"{cell_name}, {setting.name}:"
    if mine.missing:
        return
    ratio, bar = Ratio.of(mine.seconds, floor.seconds), TIME_BARS.get((setting.name, cell_name))
    if bar:
        yield (
            judged[ratio.value <= bar],
            f"{what} time {ratio.value:.3f} +-{ratio.noise:.3f}, bar {bar}",
        )
    others = {column: results[column] for column in PEERS if not results[column].missing}
    if others:
        fastest = min(others, key=lambda column: median(others[column].seconds))
        against = Ratio.of(mine.seconds, others[fastest].seconds)
        status = "even" if 1 < against.value <= 1 + against.noise else judged[against.value <= 1]
        yield (
            status,
            f"{what} {against.value:.3f} +-{against.noise:.3f} of the fastest peer's time ({fastest})",
        )
        least = others[fastest].saved
        yield (
            judged[mine.saved <= least],
            f"{what} keeps {mine.saved:.2f} MiB, the fastest peer {least:.2f}",
        )
    if cell_name == KEPT_BAR_CELL:
        kept = (
            torch.Size(cell.shape).numel()
            * 4
            / MIB
            * len(KEEPS.get(setting.spec.algorithm, ("input",)))
        )
        beyond, names = (
            mine.saved - kept,
            " and ".join(KEEPS.get(setting.spec.algorithm, ("input",))),
        )
        yield (
            judged[beyond <= KEPT_BAR],
            f"{what} keeps {beyond:.2f} MiB beyond its {names}, bar {KEPT_BAR}",
        )


def bf16_table(settings: list[Setting], tiny: bool) -> None:
    """What is kept with a bf16 base and fp32 adapters, for one layer and for q, k, v with the same
    input."""
    size, tokens = (64, 16) if tiny else (1280, 2048)
    cases = {
        "bf16 base, fp32 adapters, one layer": (1, torch.bfloat16, False),
        "q, k, v with one bf16 input": (3, torch.bfloat16, False),
        "q, k, v with one fp32 input, under bf16 autocast": (3, torch.float32, True),
    }
    for name, (count, dtype, autocast) in cases.items():
        x = torch.randn(tokens, size, dtype=dtype, requires_grad=True)
        shown = f"x is {x.nbytes / MIB:.1f} MiB of {str(dtype).removeprefix('torch.')}"
        table = Table(f"Linear {size}, {name}", f"{shown}; kept for the backward pass", timed=False)
        for setting in settings:
            results: dict[str, Result] = {}
            bases = [
                nn.Linear(size, size).to(torch.bfloat16).requires_grad_(False) for _ in range(count)
            ]
            for found in zip(*(implementations(setting, base) for base in bases), strict=True):
                column, first = found[0]
                if isinstance(first, str):
                    results[column] = Result(missing=first)
                    continue
                modules = [layer.module for _, layer in found]
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    try:
                        kept = saved_bytes(
                            lambda ms=modules, x=x: [m(x) for m in ms], [*bases, *modules]
                        )
                    except RuntimeError as error:
                        results[column] = Result(missing=f"{column} fails: {error}")
                        continue
                    results[column] = Result(kept / MIB, first.mode(x.to(torch.bfloat16)))
            table.row(setting.name, results, None)
        table.end()


def chosen_settings(only: str) -> list[Setting]:
    """The settings of the algorithms in `only`, a list with commas; a registered algorithm without
    any gets one."""
    known = {setting.spec.algorithm for setting in SETTINGS}
    more = [Setting(name, LayerSpec(16, 16.0, name)) for name in ALGORITHMS if name not in known]
    wanted = [name for name in only.split(",") if name]
    unknown = [name for name in wanted if name not in ALGORITHMS]
    if unknown:
        raise SystemExit(f"--only {','.join(unknown)}: not one of {', '.join(ALGORITHMS)}")
    return [
        setting for setting in (*SETTINGS, *more) if not wanted or setting.spec.algorithm in wanted
    ]


def main(argv: list[str] | None = None) -> int:
    """Prints the tables and a line per bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [*CELLS, "bf16"]
    parser.add_argument(
        "--cells", default=",".join(names), help=f"of {', '.join(names)}, with commas"
    )
    parser.add_argument(
        "--only", default="", help=f"algorithms, with commas, of {', '.join(ALGORITHMS)}"
    )
    parser.add_argument(
        "--repeats", type=int, default=0, help="timed turns; default 11, and 3 for Linear 4096"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny layers, to see whether all implementations run"
    )
    parser.add_argument(
        "--unet", action="store_true", help="a whole Stable Diffusion 1.5 UNet instead"
    )
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    if given.unet:
        from benchmarks import unet

        return unet.compare(
            [name for name in given.only.split(",") if name], given.repeats or 3, given.tiny
        )
    settings, bars = chosen_settings(given.only), []
    cells = TINY if given.tiny else {n: c for n, c in CELLS.items() if n in given.cells.split(",")}
    unknown = [name for name in given.cells.split(",") if name not in names]
    if unknown:
        raise SystemExit(f"--cells {','.join(unknown)}: not one of {', '.join(names)}")
    for name, cell in cells.items():
        repeats = given.repeats or cell.repeats
        table = Table(
            name,
            f"x {cell.shape} fp32; forward + backward over the frozen layer's, medians of {repeats} turns",
        )
        for setting in settings:
            results, floor = measure(cell, setting, repeats)
            table.row(setting.name, results, floor)
            bars += list(verdicts(name, cell, setting, results, floor))
        print(
            f"  the frozen layer itself: {median(floor.seconds) * 1000:.1f} ms, keeps {floor.saved:.1f} MiB"
        )
        table.end()
    if given.tiny or "bf16" in given.cells.split(","):
        bf16_table(settings, given.tiny)
    print("\n" + "\n".join(f"{status:7}{what}" for status, what in bars))
    return int(not given.tiny and "MISSED" in dict(bars))


if __name__ == "__main__":
    sys.exit(main())
