"""torch.compile of the denoiser's blocks, one class at a time.

A compiled block gets a subclass of its class that differs only in `forward`
(training/block_classes.py). All blocks of a class share the compiled function, so equal
blocks are compiled once. Hooks, wrappers of DDP and FSDP2, and checkpointing stay outside of it.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch._dynamo.utils import counters

from common.errors import ConfigError, counted
from training.block_classes import outermost, with_forward

CompileMode = Literal["none", "blocks", "auto"]
BACKEND = "inductor"
MAX_GRAPHS = 64
"""Graphs of one class: one per size of a bucket, with and without gradients, and per different
block."""


class Compiled:
    """Marks the classes that `compiled` makes."""


@cache
def compiled(cls: type[nn.Module], backend: str) -> type[nn.Module]:
    """Return a subclass of `cls` with the same name and a compiled forward pass."""
    forward = torch.compile(cls.forward, dynamic=False, backend=backend)
    return with_forward(cls, Compiled, forward)


def uses_compiler(mode: CompileMode, device: torch.device) -> bool:
    """Return whether blocks are compiled. Raises ConfigError if the machine has no compiler.

    auto: on NVIDIA and AMD GPUs that have one."""
    if mode == "none":
        return False
    if mode == "auto" and device.type != "cuda":
        return False
    error = compiler_error(device)
    if error and mode == "blocks":
        raise ConfigError(f"--compile blocks: {error}, or use --compile none")
    return not error


def compiler_error(device: torch.device) -> str:
    """Return why nothing can be compiled for a device; empty if it can."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "Triton is missing. Install it (pip install triton)"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler. Install one (apt install g++)"
    return ""


def apply(blocks: dict[str, nn.Module]) -> list[str]:
    """Compile blocks that are not inside others; return their names.

    WHEN: before they are checkpointed, because a checkpoint is outside of a compiled function."""
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    # DDP would cut the graph of a block at each bucket of gradients
    torch._dynamo.config.optimize_ddp = False
    outer_blocks = outermost(blocks)
    for block in outer_blocks.values():
        block.__class__ = compiled(type(block), BACKEND)  # type: ignore[arg-type]
    return list(outer_blocks)


class CompileCounts(NamedTuple):
    """Numbers of what torch.compile did in this process."""

    num_graphs: int
    num_breaks: int
    """Places where a compiled function returned to Python, which costs time."""

    @classmethod
    def now(cls) -> "CompileCounts":
        """Return the counts up to now."""
        breaks = counters["graph_break"]
        return cls(counters["stats"]["unique_graphs"], sum(breaks.values()))


class ReportCompilation:
    """Says after the first step what was compiled. A callback of the trainer."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.earlier_counts: CompileCounts | None = None
        self.started_at = 0.0

    def before_first_step(self) -> None:
        self.earlier_counts = CompileCounts.now()
        self.started_at = time.perf_counter()

    def after_step(self) -> None:
        if self.earlier_counts is None:
            return
        counts = CompileCounts.now()
        num_graphs = counts.num_graphs - self.earlier_counts.num_graphs
        num_breaks = counts.num_breaks - self.earlier_counts.num_breaks
        seconds = time.perf_counter() - self.started_at
        self.say(
            f"compiled {counted(num_graphs, 'graph')} with {counted(num_breaks, 'graph break')}; "
            f"validation and first step took {seconds:.0f} s"
        )
        self.earlier_counts = None
