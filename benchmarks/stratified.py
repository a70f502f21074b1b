"""How much less the gradient varies from step to step when a step's noise levels are spread evenly.

`python benchmarks/stratified.py` prints, for the embedded demo with an untrained LoRA on all
layers, the variance of the gradient (the sum over all its numbers, over many steps at the same
weights) with each sample's level drawn by itself and with `objective.stratified_timesteps`, from
the same images, noise and seeds. The rest of the variance is that of images and noise. In brackets:
the smallest and largest ratio of five parts of the steps.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from torch import Tensor

from common.process import ProcessInfo
from data.batches import MicroBatches
from data.precompute.build import build_datasets
from data.schedule import Schedule
from models import get_family
from training import build
from training.cli import load_config
from training.config import TrainConfig
from training.loss import build_loss

PROJECT = Path(__file__).resolve().parent.parent
PARTS = 5
OBJECTIVES = {
    "prediction": [],
    "x0": ["--objective.loss_space=x0"],
    "min-snr": ["--objective.loss_weighting=min-snr"],
}
SIZES = (4, 16)


class Gradients:
    """The gradient of the demo's loss on any batch, at the weights it starts from."""

    def __init__(self, config: TrainConfig):
        self.config, self.family = config, get_family(config.model)
        self.dataset = build_datasets(
            config.data,
            self.family,
            ProcessInfo.of(Accelerator(cpu=True)),
            not config.bucket_mode,
        ).train
        self.denoiser, self.dtype = build.load_denoiser(config, self.family)
        adapted, _ = build.attach_adapters(config, self.family, self.denoiser, None)  # type: ignore[arg-type]
        self.parameters = list(adapted.named_parameters().values())

    def of_steps(self, config: TrainConfig, size: int, steps: int) -> tuple[Tensor, Tensor]:
        """Gradients (steps, numbers) and losses (steps,)."""
        loss_function = build_loss(self.family, config.objective, config.loss_function, self.dtype)
        schedule = Schedule(self.dataset.buckets, self.dataset.content_hash, config.seed, size)
        batches, gradients, losses = MicroBatches(self.dataset, schedule, config.objective), [], []
        for step in range(steps):
            loss = loss_function(self.denoiser, batches[step]).mean()
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
            losses.append(loss.detach())
        return torch.stack(gradients), torch.stack(losses)


def variances(values: Tensor) -> list[float]:
    """Of all the steps, then of each of PARTS parts of them."""
    return [part.var(0).sum().item() for part in (values, *values.chunk(PARTS))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="steps to take the variance over")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = [
            "--no_gradient_checkpointing",
            f"--data.cache_dir={folder}",
            f"--output_dir={folder}/out",
        ]
        recipe = str(PROJECT / "recipes" / "demo.yaml")
        source = Gradients(load_config([recipe, *base]))
        print(
            f"{'loss':12}{'samples':>8}{'gradient':>12}{'stratified':>12}{'ratio':>8}{'':16}{'ratio of the loss':>18}"
        )
        for name, options in OBJECTIVES.items():
            config = load_config([recipe, *base, *options])
            even = replace(config, objective=replace(config.objective, stratified_timesteps=True))
            for size in SIZES:
                plain, spread = (source.of_steps(c, size, given.steps) for c in (config, even))
                both = [variances(gradients) for gradients, _ in (plain, spread)]
                ratios = [b / a for a, b in zip(*both, strict=True)]
                losses = spread[1].var().item() / plain[1].var().item()
                span = f"({min(ratios[1:]):.2f} .. {max(ratios[1:]):.2f})"
                print(
                    f"{name:12}{size:8}{both[0][0]:12.3e}{both[1][0]:12.3e}{ratios[0]:8.3f}{span:>16}{losses:18.3f}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
