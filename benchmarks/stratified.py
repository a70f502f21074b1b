"""Reduction of the gradient's variance by spreading a step's noise levels evenly.

`python benchmarks/stratified.py` uses the embedded demo with an untrained LoRA on all layers. It
prints the variance of the gradient over many steps at the same weights: the sum over all
elements of the gradient. Each sample's noise level is drawn independently, and then with
`objective.stratified_timesteps`, from the same images, noise and seeds. The remaining variance
is that of images and noise. The brackets hold the smallest and largest ratio of five chunks of
steps.
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

from adapter_files.spellings import layer_spellings
from common.process import ProcessInfo
from data.batches import MicroBatches
from data.precompute.build import build_datasets
from data.schedule import Schedule
from models.detect import get_family
from training import build
from training.cli import load_config
from training.config import TrainConfig
from training.loss import build_loss

PROJECT = Path(__file__).resolve().parent.parent
NUM_CHUNKS = 5
OBJECTIVES = {
    "prediction": [],
    "x0": ["--objective.loss_space=x0"],
    "min-snr": ["--objective.loss_weighting=min-snr"],
}
BATCH_SIZES = (4, 16)


class GradientSampler:
    """Computes gradients of the demo's loss at its initial weights."""

    def __init__(self, config: TrainConfig):
        self.config, self.family = config, get_family(config.model)
        process = ProcessInfo.of(Accelerator(cpu=True))
        datasets = build_datasets(config.data, self.family, process, not config.bucket_mode)
        self.dataset = datasets.train
        self.denoiser, self.dtype = build.load_denoiser(config, self.family, torch.device("cpu"))
        names = layer_spellings(self.family, self.denoiser)
        adapted, _ = build.attach_adapters(config, self.family, self.denoiser, names)
        self.parameters = list(adapted.named_parameters().values())

    def sample(self, config: TrainConfig, batch_size: int, num_steps: int) -> tuple[Tensor, Tensor]:
        """Return gradients (steps, elements) and losses (steps,)."""
        loss_function = build_loss(self.family, config.objective, config.loss_function, self.dtype)
        schedule = Schedule(
            self.dataset.buckets, self.dataset.content_hash, config.seed, batch_size
        )
        batches = MicroBatches(self.dataset, schedule, config.objective)
        gradients, losses = [], []
        for step in range(num_steps):
            loss = loss_function(self.denoiser, batches[step]).mean()
            tensors = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            flat_tensors = [tensor.flatten() for tensor in tensors if tensor is not None]
            gradients.append(torch.cat(flat_tensors))
            losses.append(loss.detach())
        return torch.stack(gradients), torch.stack(losses)


def variances(gradients: Tensor) -> list[float]:
    """Return the variance over all steps, then over each chunk of steps."""
    chunks = (gradients, *gradients.chunk(NUM_CHUNKS))
    return [chunk.var(0).sum().item() for chunk in chunks]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="steps of each variance")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base_options = [
            str(PROJECT / "recipes" / "demo.yaml"),
            "--no_gradient_checkpointing",
            f"--data.cache_dir={folder}",
            f"--output_dir={folder}/out",
        ]
        sampler = GradientSampler(load_config(base_options))
        header = f"{'loss':12}{'samples':>8}{'gradient':>12}{'stratified':>12}{'ratio':>8}{'':16}"
        print(f"{header}{'ratio of the loss':>18}")
        for name, options in OBJECTIVES.items():
            config = load_config([*base_options, *options])
            for batch_size in BATCH_SIZES:
                print_row(name, sampler, config, batch_size, arguments.steps)
    return 0


def print_row(
    name: str, sampler: GradientSampler, config: TrainConfig, batch_size: int, num_steps: int
) -> None:
    """Compare independent with stratified noise levels for one objective and batch size."""
    objective = replace(config.objective, stratified_timesteps=True)
    stratified_config = replace(config, objective=objective)
    gradients, losses = sampler.sample(config, batch_size, num_steps)
    independent, independent_loss = variances(gradients), losses.var().item()
    del gradients  # a run of 200 steps holds gigabytes
    gradients, losses = sampler.sample(stratified_config, batch_size, num_steps)
    stratified, stratified_loss = variances(gradients), losses.var().item()
    ratios = [b / a for a, b in zip(independent, stratified, strict=True)]
    span = f"({min(ratios[1:]):.2f} .. {max(ratios[1:]):.2f})"
    values = f"{independent[0]:12.3e}{stratified[0]:12.3e}{ratios[0]:8.3f}{span:>16}"
    print(f"{name:12}{batch_size:8}{values}{stratified_loss / independent_loss:18.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
