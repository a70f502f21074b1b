"""Host time of a step of many small layers, as a ratio to PEFT: `python benchmarks/host_time.py`.

Kernels of a few numbers cost nothing, so the time is that of Python and of launching operations.
On a GPU such time is hidden only while the GPU has work. A step is a forward pass under autocast, a
backward pass, and a step of AdamW over the adapters. Our layers and PEFT's take turns. The exit
code is 1 if the ratio of a bar is over it.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")  # set before torch is imported
PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.implementations import (  # noqa: E402
    Layer,
    Setting,
    UnsupportedError,
    ours,
    peft,
    quiet,
    setting,
)
from lora_algos.adapted_model import AdaptedModel  # noqa: E402

SETTINGS = (
    setting("LoRA", "LoRA", 1),
    setting("DoRA", "DoRA", 1),
    setting("LoHa", "LoHa", 1),
    setting("LoKr", "LoKr", 1, factor=2),
    setting("OFT", "OFT", block_size=2),
    setting("BOFT", "BOFT", block_size=2, stages=2),
)
BARS = {"LoRA": 0.7}
"""Algorithm -> largest ratio of our step to PEFT's."""
WIDTH = 4
COLUMNS: dict[str, Callable[[Setting, nn.Module], Layer]] = {"ours": ours, "PEFT": peft}


class Chain(nn.Module):
    """Layers, one after the other."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass
class Contender:
    """A chain of adapted layers, and the seconds that its steps took."""

    chain: Chain
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def build(
        cls, attach: Callable[[Setting, nn.Module], Layer], setting: Setting, num_layers: int
    ) -> "Contender":
        """Attach adapters to new layers. Raises UnsupportedError."""
        layers, parameters = [], []
        for _ in range(num_layers):
            base = nn.Linear(WIDTH, WIDTH).bfloat16().requires_grad_(False)
            with quiet():
                layer = attach(setting, base)
            layers.append(layer.module)
            parameters += layer.trained
        chain = Chain(layers)
        AdaptedModel(chain).prepare_once_per_step()  # as in a training
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        return cls(chain, optimizer)

    def step(self, x: Tensor) -> None:
        """Take a training step."""
        with torch.autocast("cpu", torch.bfloat16):
            y = self.chain(x)
        y.float().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def time_step(self, x: Tensor) -> None:
        start = time.process_time()
        self.step(x)
        self.seconds.append(time.process_time() - start)


def measure(setting: Setting, num_layers: int, repeats: int) -> dict[str, float]:
    """Return the median microseconds per layer of each column. Raises UnsupportedError."""
    torch.manual_seed(0)
    contenders = {}
    for name, attach in COLUMNS.items():
        contenders[name] = Contender.build(attach, setting, num_layers)
    x = torch.randn(1, 2, WIDTH)
    for contender in contenders.values():
        contender.step(x)
    for _ in range(repeats):
        for contender in contenders.values():
            contender.time_step(x)
    microseconds = 1e6 / num_layers
    return {name: microseconds * median(c.seconds) for name, c in contenders.items()}


def rows(num_layers: int, repeats: int) -> Iterator[tuple[str, float, float]]:
    """Yield name and microseconds per layer, ours and PEFT's, of each algorithm."""
    for measured in SETTINGS:
        try:
            result = measure(measured, num_layers, repeats)
        except UnsupportedError as error:
            print(f"{measured.name}: {error}")
            continue
        yield measured.name, result["ours"], result["PEFT"]


def main() -> int:
    """Print the table; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"microseconds per layer and step, {options.layers} layers")
    print(f"{'':8}{'ours':>8}{'PEFT':>8}{'ratio':>8}")
    is_missed = False
    for name, own_time, peft_time in rows(options.layers, options.repeats):
        ratio = own_time / peft_time
        verdict = ""
        if name in BARS:
            verdict = f"  bar {BARS[name]}"
            is_missed |= ratio > BARS[name]
        print(f"{name:8}{own_time:8.0f}{peft_time:8.0f}{ratio:8.2f}{verdict}", flush=True)
    return int(is_missed)


if __name__ == "__main__":
    sys.exit(main())
