"""Parts that the training scripts of the two base models share."""

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from emoji_source import Emoji, load_pixels, save_grid
from torch import Tensor, nn

SHOWN_NAMES = (
    "grinning", "heart_eyes", "cat", "tiger", "fox_face", "turtle", "tropical_fish", "penguin",
    "pizza", "strawberry", "doughnut", "beer", "tulip", "cactus", "heart", "ghost",
)  # fmt: skip
SNAPSHOT_EVERY = 2000
"""Steps between two pictures of an unfinished base in the work folder."""
SAVE_EVERY = 250
"""Steps between two saved states of a training, from which a stopped script continues."""


WARMUP_STEPS = 200
MIN_RATE = 1e-6


def parse_arguments(description: str, base_name: str, steps: int) -> argparse.Namespace:
    """Read the command line of a script that trains a base.

    `base_name`: its folder. `steps`: default of the denoiser's steps."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, required=True, help="folder with node_modules")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / base_name)
    parser.add_argument("--autoencoder-steps", type=int, default=3500)
    parser.add_argument("--steps", type=int, default=steps)
    return parser.parse_args()


class MovingAverage:
    """Exponential moving average of parameters. Its decay rises to `decay` in the first steps."""

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.parameters, self.decay = list(parameters), decay
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    def update(self, step: int) -> None:
        """Update the average after step number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [parameter.detach() for parameter in self.parameters]
        torch._foreach_lerp_(self.values, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the parameters for a block."""
        own_values = [parameter.detach().clone() for parameter in self.parameters]
        self._copy(self.values)
        yield
        self._copy(own_values)

    def copy_to_parameters(self) -> None:
        """Replace the parameters by their average."""
        self._copy(self.values)

    def load(self, parameters: list[Tensor], values: list[Tensor]) -> None:
        """Replace the parameters and their average by saved ones."""
        self._copy(parameters)
        self.values = [value.detach().clone() for value in values]

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


class SavedTraining:
    """The state of a training in a file, so that a stopped script continues where it was."""

    def __init__(self, file: Path, optimizer: torch.optim.Optimizer, average: MovingAverage):
        self.file, self.optimizer, self.average = file, optimizer, average

    def load(self) -> int:
        """Load the saved state if there is one. Return the number of steps taken."""
        if not self.file.exists():
            return 0
        state = torch.load(self.file, weights_only=True)
        self.average.load(state["parameters"], state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        return state["step"]

    def save(self, step: int) -> None:
        """Save the state after `step` steps, on each `SAVE_EVERY`-th step."""
        if step % SAVE_EVERY:
            return
        state = {
            "step": step,
            "parameters": self.average.parameters,
            "average": self.average.values,
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        partial = self.file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.file)


class TrainingLog:
    """Prints the mean loss and the seconds per step every 250 steps."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps = name, steps
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.previous = time.perf_counter()

    def add(self, step: int, loss: Tensor) -> None:
        self.losses.append(loss.item())
        now = time.perf_counter()
        self.seconds.append(now - self.previous)
        self.previous = now
        if (step + 1) % 250 == 0 or step + 1 == self.steps:
            seconds = sum(self.seconds) / len(self.seconds)
            mean = sum(self.losses) / len(self.losses)
            print(
                f"{self.name} step {step + 1}/{self.steps} loss {mean:.5f} {seconds:.3f} s/step",
                flush=True,
            )
            self.losses.clear()
            self.seconds.clear()


@dataclass(frozen=True)
class TrainingPlan:
    """Options of one training."""

    name: str
    steps: int
    peak_rate: float
    decay: float
    """Decay of the moving average, which is the result."""
    weight_decay: float
    state_file: Path


class BatchLoss(NamedTuple):
    """The loss of a batch, and the number to print."""

    loss: Tensor
    printed: Tensor


def minimize(
    plan: TrainingPlan,
    parameters: list[Tensor],
    batch_loss: Callable[[int], BatchLoss],
    save_snapshot: Callable[[], None] | None = None,
) -> None:
    """Train parameters in place, with AdamW and a cosine schedule.

    `batch_loss`: draws the batch of a step. `save_snapshot`: called with the average in the parameters."""
    optimizer = torch.optim.AdamW(
        parameters, weight_decay=plan.weight_decay, betas=(0.9, 0.99), fused=True
    )
    average = MovingAverage(parameters, plan.decay)
    log = TrainingLog(plan.name, plan.steps)
    saved = SavedTraining(plan.state_file, optimizer, average)
    for step in range(saved.load(), plan.steps):
        loss, printed = batch_loss(step)
        rate = plan.peak_rate * cosine(step, plan.steps, WARMUP_STEPS)
        take_step(loss, optimizer, max(MIN_RATE, rate))
        average.update(step)
        log.add(step, printed)
        saved.save(step + 1)
        if save_snapshot is not None and (step + 1) % SNAPSHOT_EVERY == 0:
            with average.applied():
                save_snapshot()
    average.copy_to_parameters()


class CaptionedRows(NamedTuple):
    """Random emoji: their indices, whether they are mirrored, and the indices of their captions."""

    index: Tensor
    flip: Tensor
    caption: Tensor


def draw_rows(num_emoji: int, batch_size: int, mirror: bool) -> CaptionedRows:
    """Draw a batch. A tenth of the captions is the empty one, which follows the others.

    `mirror`: mirror half of the emoji."""
    index = torch.randint(num_emoji, (batch_size,))
    flip = torch.randint(2 if mirror else 1, (batch_size,))
    is_dropped = torch.rand(batch_size) < 0.1
    return CaptionedRows(index, flip, torch.where(is_dropped, num_emoji, index))


def take_step(loss: Tensor, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Take a step with gradient clipping at the given learning rate."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def cosine(step: int, steps: int, warmup: int) -> float:
    """Return the factor of a cosine schedule with linear warm-up."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def print_sizes(pipeline: DiffusionPipeline) -> None:
    """Print the number of parameters of each model in the pipeline."""
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            count = sum(parameter.numel() for parameter in component.parameters())
            print(f"{name}: {count:,} parameters", flush=True)


def save_base(
    pipeline: DiffusionPipeline,
    emoji: list[Emoji],
    folder: Path,
    draw: Callable[[DiffusionPipeline, list[str]], Tensor],
) -> None:
    """Write the pipeline in fp16, and a picture of emoji above images drawn from their captions."""
    copy.deepcopy(pipeline).to(dtype=torch.float16).save_pretrained(folder)
    by_name = {item.name: item for item in emoji}
    shown = [by_name[name] for name in SHOWN_NAMES]
    images = draw(pipeline, [item.caption for item in shown])
    save_grid([load_pixels(shown), images], folder.parent / f"{folder.name}.png")
