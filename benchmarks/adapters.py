"""Cost of an adapter on one layer, compared with PEFT and LyCORIS: time, and memory that is kept
for the backward pass.

`python benchmarks/adapters.py` prints a table per layer and a line per bar. The exit code is 1
if a bar is missed. All implementations take turns in one process on one thread. Time is the CPU
time of forward and backward pass, relative to the frozen layer without adapter. The backward
pass of the frozen layer computes only the gradient of its input. LyCORIS is optional: `pip
install lycoris-lora==4.1.3`. `--unet` measures a whole Stable Diffusion 1.5 UNet instead
(benchmarks/unet.py).
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

# set before torch is imported: two threads on two busy cores wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.adapter_tables import OURS, Ratio, Result, Table, Verdict
from benchmarks.implementations import (
    LYCORIS_ERROR,
    PEERS,
    SETTINGS,
    Layer,
    Setting,
    UnsupportedError,
    ours,
    quiet,
)
from lora_algos import ALGORITHMS
from lora_algos.config import LayerSpec

MIB = 2**20
FP32_BYTES = 4
FLOOR = ""
"""Name of the frozen layer among the results."""


@dataclass(frozen=True)
class Case:
    """A layer and the shape of its input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    repeats: int = 11


CASES = {
    "Linear 1280": Case(lambda: nn.Linear(1280, 1280), (2, 1024, 1280)),
    "Conv 320 3x3": Case(lambda: nn.Conv2d(320, 320, 3, padding=1), (2, 320, 32, 32)),
    "Linear 4096": Case(lambda: nn.Linear(4096, 4096), (1, 1024, 4096), 3),
}
TINY_CASES = {
    "Linear 64": Case(lambda: nn.Linear(64, 64), (2, 8, 64), 1),
    "Conv 64 3x3": Case(lambda: nn.Conv2d(64, 64, 3, padding=1), (2, 64, 4, 4), 1),
}
BF16 = "bf16"
"""Name of the table of memory with a bf16 base, among those of the cases."""
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
"""Largest time relative to the frozen layer."""
KEPT_TENSORS = {"OFT": ("output",), "BOFT": ("output",), "DoRA": ("input", "output")}
"""Tensors that a backward pass needs; algorithms that are not in here need the input alone."""
KEPT_BAR, KEPT_BAR_CASE = 0.15, "Linear 1280"
"""MiB beyond those tensors, and the layer for which the bar holds."""


def saved_bytes(call: Callable[[], object], modules: list[nn.Module]) -> int:
    """Return the bytes that autograd keeps for the backward pass of `call`: each storage once,
    parameters not included."""
    parameters = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # alive until the end of the block, so that no address is used twice
        for tensor in prepared_tensors(result):
            pack(tensor)
    del result
    return sum(sizes.values())


def prepared_tensors(result: object) -> Iterator[Tensor]:
    """Yield what the nodes of a graph keep as prepared factors, which no hook sees."""
    waiting = [getattr(result, "grad_fn", None)]
    if isinstance(result, tuple):
        waiting = [tensor.grad_fn for tensor in result]
    visited = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        yield from getattr(node, "prepared", ())
        waiting += [next_node for next_node, _ in node.next_functions]


def implementations(setting: Setting, base: nn.Module) -> Iterator[tuple[str, Layer | str]]:
    """Yield each column with its layer, or with the reason why it has none. All layers share the
    weights of `base`."""
    for column, build in {OURS: ours, **PEERS}.items():
        try:
            if column.startswith("LyCORIS") and LYCORIS_ERROR:
                raise UnsupportedError(LYCORIS_ERROR)
            with quiet():
                layer = build(setting, base)
        except (UnsupportedError, ValueError, NotImplementedError) as error:
            yield column, " ".join(str(error).split())
            continue
        with torch.no_grad():
            for parameter in layer.trained:
                # so that no factor is zero
                parameter += 0.01 * torch.randn_like(parameter)
        yield column, layer


def measure(case: Case, setting: Setting, repeats: int) -> tuple[dict[str, Result], Result]:
    """Return the results by column, and that of the frozen layer."""
    torch.manual_seed(0)
    base = case.make().requires_grad_(False)
    x = torch.randn(case.shape, requires_grad=True)
    grad = torch.randn_like(base(x))
    layers: dict[str, Layer] = {FLOOR: Layer(base, [])}
    results = {FLOOR: Result()}
    for column, layer in implementations(setting, base):
        if isinstance(layer, str):
            results[column] = Result(error=layer)
        else:
            results[column] = Result(mode=layer.mode(x))
            layers[column] = layer
    for column, layer in layers.items():
        num_bytes = saved_bytes(
            lambda module=layer.module: module(x),  # type: ignore[misc]
            [base, layer.module],
        )
        results[column].saved = num_bytes / MIB
    columns = list(layers)
    for turn in range(-1, repeats):
        shift = turn % len(columns)
        for column in columns[shift:] + columns[:shift]:
            layer = layers[column]
            start = time.process_time()
            torch.autograd.grad(layer.module(x), [x, *layer.trained], grad)
            seconds = time.process_time() - start
            if turn >= 0:  # the first turn warms up
                results[column].seconds.append(seconds)
    floor = results.pop(FLOOR)
    return results, floor


def verdicts(
    case_name: str, case: Case, setting: Setting, results: dict[str, Result], floor: Result
) -> Iterator[Verdict]:
    """Yield the verdict of every bar on a row."""
    result, label = results[OURS], f"{case_name}, {setting.name}:"
    if result.error:
        return
    bar = TIME_BARS.get((setting.name, case_name))
    if bar:
        ratio = Ratio.of(result.seconds, floor.seconds)
        yield Verdict.of(ratio.value <= bar, f"{label} time {ratio}, bar {bar}")
    peers = {column: results[column] for column in PEERS if not results[column].error}
    if peers:
        yield from peer_verdicts(label, result, peers)
    if case_name == KEPT_BAR_CASE:
        names = KEPT_TENSORS.get(setting.spec.algorithm, ("input",))
        input_size = torch.Size(case.shape).numel() * FP32_BYTES / MIB
        extra = result.saved - input_size * len(names)
        text = f"{label} keeps {extra:.2f} MiB beyond its {' and '.join(names)}, bar {KEPT_BAR}"
        yield Verdict.of(extra <= KEPT_BAR, text)


def peer_verdicts(label: str, result: Result, peers: dict[str, Result]) -> Iterator[Verdict]:
    """Yield the verdicts against the fastest other library: its time and its memory."""
    fastest = min(peers, key=lambda column: median(peers[column].seconds))
    ratio = Ratio.of(result.seconds, peers[fastest].seconds)
    text = f"{label} {ratio} of the fastest peer's time ({fastest})"
    if 1 < ratio.value <= 1 + ratio.noise:
        yield Verdict("even", text)
    else:
        yield Verdict.of(ratio.value <= 1, text)
    peer_saved = peers[fastest].saved
    text = f"{label} keeps {result.saved:.2f} MiB, the fastest peer {peer_saved:.2f}"
    yield Verdict.of(result.saved <= peer_saved, text)


class MemoryCase(NamedTuple):
    """A number of layers that have the same input."""

    num_layers: int
    input_dtype: torch.dtype
    autocast: bool


MEMORY_CASES = {
    "bf16 base, fp32 adapters, one layer": MemoryCase(1, torch.bfloat16, False),
    "q, k, v with one bf16 input": MemoryCase(3, torch.bfloat16, False),
    "q, k, v with one fp32 input, under bf16 autocast": MemoryCase(3, torch.float32, True),
}


def bf16_tables(settings: list[Setting], tiny: bool) -> None:
    """Print the memory that is kept with a bf16 base and fp32 adapters, for one layer and for q, k,
    v with the same input."""
    size, num_tokens = (64, 16) if tiny else (1280, 2048)
    for name, case in MEMORY_CASES.items():
        x = torch.randn(num_tokens, size, dtype=case.input_dtype, requires_grad=True)
        dtype_name = str(case.input_dtype).removeprefix("torch.")
        note = f"x is {x.nbytes / MIB:.1f} MiB of {dtype_name}; kept for the backward pass"
        table = Table(f"Linear {size}, {name}", note, is_timed=False)
        for setting in settings:
            table.row(setting.name, measure_memory(case, setting, x), None)
        table.print_notes()


def measure_memory(case: MemoryCase, setting: Setting, x: Tensor) -> dict[str, Result]:
    """Return the memory that each implementation keeps for layers with the input `x`."""
    size = x.shape[-1]
    bases = [
        nn.Linear(size, size).to(torch.bfloat16).requires_grad_(False)
        for _ in range(case.num_layers)
    ]
    results: dict[str, Result] = {}
    for entries in zip(*(implementations(setting, base) for base in bases), strict=True):
        column, first_layer = entries[0]
        if isinstance(first_layer, str):
            results[column] = Result(error=first_layer)
            continue
        modules = [layer.module for _, layer in entries]
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            try:
                num_bytes = saved_bytes(
                    lambda modules=modules: [module(x) for module in modules],  # type: ignore[misc]
                    [*bases, *modules],
                )
            except RuntimeError as error:
                results[column] = Result(error=f"{column} fails: {error}")
                continue
            mode = first_layer.mode(x.to(torch.bfloat16))
            results[column] = Result(num_bytes / MIB, mode)
    return results


def selected_settings(algorithms: str) -> list[Setting]:
    """Return the settings of algorithms, separated by commas; empty: of all. An algorithm without a
    setting gets one."""
    names = [name for name in algorithms.split(",") if name]
    unknown_names = [name for name in names if name not in ALGORITHMS]
    if unknown_names:
        raise SystemExit(
            f"--only {','.join(unknown_names)}: unknown algorithm; expected {', '.join(ALGORITHMS)}"
        )
    covered = {setting.spec.algorithm for setting in SETTINGS}
    settings = list(SETTINGS)
    for name in ALGORITHMS:
        if name not in covered:
            settings.append(Setting(name, LayerSpec(16, 16.0, name)))
    return [setting for setting in settings if not names or setting.spec.algorithm in names]


def main(argv: list[str] | None = None) -> int:
    """Print the tables and a line per bar; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = [*CASES, BF16]
    parser.add_argument(
        "--cells",
        default=",".join(tables),
        help=f"tables, separated by commas, of {', '.join(tables)}",
    )
    parser.add_argument(
        "--only", default="", help=f"algorithms, separated by commas, of {', '.join(ALGORITHMS)}"
    )
    parser.add_argument(
        "--repeats", type=int, default=0, help="timed turns; default 11, and 3 for Linear 4096"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny layers, to test that all implementations run"
    )
    parser.add_argument(
        "--unet", action="store_true", help="a whole Stable Diffusion 1.5 UNet instead"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.unet:
        from benchmarks import unet

        algorithms = [name for name in options.only.split(",") if name]
        return unet.compare(algorithms, options.repeats or 3, options.tiny)
    settings = selected_settings(options.only)
    selected_tables = options.cells.split(",")
    unknown_tables = [name for name in selected_tables if name not in tables]
    if unknown_tables:
        raise SystemExit(
            f"--cells {','.join(unknown_tables)}: unknown table; expected {', '.join(tables)}"
        )
    cases = {name: case for name, case in CASES.items() if name in selected_tables}
    if options.tiny:
        cases = TINY_CASES
    all_verdicts: list[Verdict] = []
    for name, case in cases.items():
        all_verdicts += compare(name, case, settings, options.repeats or case.repeats)
    if options.tiny or BF16 in selected_tables:
        bf16_tables(settings, options.tiny)
    print()
    for verdict in all_verdicts:
        print(f"{verdict.status:7}{verdict.text}")
    is_missed = any(verdict.status == "MISSED" for verdict in all_verdicts)
    return int(is_missed and not options.tiny)


def compare(name: str, case: Case, settings: list[Setting], repeats: int) -> list[Verdict]:
    """Print the table of a layer; return its verdicts."""
    table = Table(
        name,
        f"x {case.shape} fp32; forward + backward over the frozen layer's, medians of {repeats} "
        "turns",
    )
    all_verdicts: list[Verdict] = []
    for setting in settings:
        results, floor = measure(case, setting, repeats)
        table.row(setting.name, results, floor)
        all_verdicts += verdicts(name, case, setting, results, floor)
    milliseconds = median(floor.seconds) * 1000
    print(f"  the frozen layer itself: {milliseconds:.1f} ms, keeps {floor.saved:.1f} MiB")
    table.print_notes()
    return all_verdicts


if __name__ == "__main__":
    sys.exit(main())
