"""Overhead of the trainer as two ratios: its loop over a hand-written loop, and its start over
the bare imports.

`python benchmarks/loop.py` measures both on the embedded demo. The exit code is 1 if a ratio is
over its bar.
"""

import argparse
import contextlib
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

# set before torch is imported: two threads on two busy cores wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

LOOP_BAR = 1.03
START_BAR = 1.5
WARM_UP_STEPS = 5
DEMO = str(PROJECT / "recipes" / "demo.yaml")
# the hand-written loop has neither a schedule of the learning rate nor a loss weighting; the run has
# more steps than are timed, so the work after a last step is not timed
LOOP_OPTIONS = [
    "--optim.lr_scheduler=constant",
    "--objective.loss_weighting=none",
    "--optim.lr_warmup_steps=0",
    "--steps=100000",
    "--checkpoint.every=0",
]
# not the demo's images: the validation before step 1 costs more, the more images there are
FIXTURES = PROJECT / "tests" / "fixtures" / "twemoji"
START_OPTIONS = [
    "--steps=1",
    "--no_preview",
    f"--data.path={FIXTURES / 'train'}",
    f"--data.validation_path={FIXTURES / 'validation'}",
]
MAX_LOSS_DIFFERENCE = 1e-3

LEAVE = f"""
import os, sys; sys.path.insert(0, {str(PROJECT)!r})
def leave():
    os.write(1, "\\n".join(["", "modules:", *sys.modules]).encode())
    os._exit(0)
"""
"""Code that defines `leave()`: it prints the names of all imported modules and ends the process."""
LIBRARIES = """
import torch, accelerate, datasets, peft, safetensors.torch
from diffusers import DDPMScheduler, UNet2DConditionModel
import PIL.Image, pydantic, tqdm, tyro, yaml
leave()
"""
FIRST_STEP = """
import train_lora
from training import run
train = run.train
def train_until_first_batch(*arguments):
    from training.batch_stream import BatchStream
    from_step = BatchStream.from_step
    def first_batch(*arguments):
        next(from_step(*arguments))
        leave()
        yield
    BatchStream.from_step = first_batch
    train(*arguments)
run.train = train_until_first_batch
sys.exit(train_lora.main() or "the script ended without a step")
"""
"""Code that runs train_lora.py until it has its first batch."""


@dataclass(frozen=True)
class Comparison:
    """Median seconds of the trainer and of the bare code, and the ratio of their median CPU
    times."""

    name: str
    bar: float
    trainer_seconds: float
    bare_seconds: float
    cpu_ratio: float
    count: int
    note: str

    @property
    def ratio(self) -> float:
        return self.trainer_seconds / self.bare_seconds

    @property
    def is_met(self) -> bool:
        return self.ratio <= self.bar


class Moment(NamedTuple):
    """Seconds by the clock, and CPU seconds of this process and of its children that have ended."""

    clock: float
    cpu: float

    @classmethod
    def now(cls) -> "Moment":
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = time.process_time() + children.ru_utime + children.ru_stime
        return cls(time.perf_counter(), cpu)


class Turn(NamedTuple):
    """The trainer works from `start` to `middle`, the bare code from `middle` to `end`."""

    start: Moment
    middle: Moment
    end: Moment


def compare_turns(name: str, bar: float, turns: list[Turn], note: str) -> Comparison:
    """Return the medians over the turns."""
    trainer_seconds = median(turn.middle.clock - turn.start.clock for turn in turns)
    bare_seconds = median(turn.end.clock - turn.middle.clock for turn in turns)
    trainer_cpu = median(turn.middle.cpu - turn.start.cpu for turn in turns)
    bare_cpu = median(turn.end.cpu - turn.middle.cpu for turn in turns)
    cpu_ratio = trainer_cpu / bare_cpu
    return Comparison(name, bar, trainer_seconds, bare_seconds, cpu_ratio, len(turns), note)


class BareLoop:
    """The training step of a run, written by hand with diffusers, PEFT and torch, on its own
    copy of the model."""

    def __init__(self, config: Any, adapted: Any):
        """`adapted`: the model of the run, whose initial adapter weights are copied."""
        import torch
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from peft import LoraConfig, inject_adapter_in_model

        path = config.model.path
        self.max_grad_norm = config.optim.max_grad_norm
        self.dtype = torch.bfloat16 if config.training_dtype == "bf16" else torch.float32
        self.scale = UNet2DConditionModel.load_config(path, subfolder="vae")["scaling_factor"]
        self.scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler")
        unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=self.dtype)
        unet.requires_grad_(False)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        unet.to(memory_format=torch.channels_last).train()
        layers = list(adapted.specs())
        lora = LoraConfig(r=config.rank, lora_alpha=config.adapter.alpha, target_modules=layers)
        self.unet = inject_adapter_in_model(lora, unet)
        self.parameters = [p for p in unet.parameters() if p.requires_grad]
        parameters = dict(unet.named_parameters())
        for name, value in adapted.named_parameters().items():
            peft_name = name.replace("lora_down", "lora_A.default")
            peft_name = peft_name.replace("lora_up", "lora_B.default")
            parameters[peft_name].data = value.detach().clone()
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.learning_rate, weight_decay=0.01, fused=True
        )

    def step(self, batch: Any) -> Any:
        """Update the weights once; return the loss."""
        import torch

        timestep = (batch.quantile * len(self.scheduler.alphas_cumprod)).long()
        latents = batch.latents * self.scale
        noisy = self.scheduler.add_noise(latents, batch.noise, timestep).to(self.dtype)
        prompt = batch.cond["prompt_embeds"].to(self.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            prediction = self.unet(noisy, timestep, prompt, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(prediction.float(), batch.noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class InterleavedBatches:
    """Batches of a run. After each step of the run, the bare loop takes a step on the same batch,
    and both are timed.

    The time of the run is from one request for a batch to the next one, so it includes loading, the
    callbacks and everything else that a step does.
    """

    def __init__(self, trainer: Any, num_steps: int):
        self.stream, self.num_steps = trainer.batches, num_steps
        self.bare_loop = BareLoop(trainer.config, trainer.engine.adapted)
        self.bare_losses: list[Any] = []
        self.turns: list[Turn] = []

    def from_step(self, step: int, micro_batches_per_step: int) -> Iterator[Any]:
        """Yield the batches, then stop the run."""
        from training.stopping.signals import RunStopped, StopRequest

        source = self.stream.from_step(step, micro_batches_per_step)
        for _ in range(self.num_steps):
            start = Moment.now()
            batch = next(source)
            yield batch
            middle = Moment.now()
            self.bare_losses.append(self.bare_loop.step(batch))
            self.turns.append(Turn(start, middle, Moment.now()))
        raise RunStopped(StopRequest.TERMINATE, "all steps are timed", is_agreed=True)


def compare_loops(folder: Path, steps: int, options: list[str]) -> Comparison:
    """Run the trainer and the bare loop in turns, step by step. Raises RuntimeError if their losses
    differ."""
    from training.cli import load_config
    from training.run import run_training
    from training.stopping.signals import RunStopped, SignalHandler
    from training.trainer import Trainer

    runs: list[tuple[Trainer, InterleavedBatches]] = []
    train = Trainer.train

    def train_in_turns(trainer: Trainer) -> None:
        batches = InterleavedBatches(trainer, WARM_UP_STEPS + steps)
        runs.append((trainer, batches))
        trainer.batches = batches  # type: ignore[assignment]
        train(trainer)

    config = load_config([DEMO, *LOOP_OPTIONS, f"--output_dir={folder / 'loop'}", *options])
    with (
        patch.object(Trainer, "train", train_in_turns),
        contextlib.redirect_stderr(io.StringIO()) as log,
        contextlib.redirect_stdout(log),
        contextlib.suppress(RunStopped),
    ):
        run_training(config, SignalHandler())
        raise RuntimeError(f"the run ended before all steps were timed:\n{log.getvalue()}")
    trainer, batches = runs[0]
    losses = [*trainer.state.history.micro_losses, *trainer.buffer.losses]
    difference = max(
        abs(float(loss) / float(bare_loss) - 1)
        for loss, bare_loss in zip(losses, batches.bare_losses, strict=True)
    )
    if difference > MAX_LOSS_DIFFERENCE:
        raise RuntimeError(
            f"the losses of the two loops differ by up to {difference:.0e}, "
            "so they do different work"
        )
    note = f"losses differ by at most {difference:.0e}"
    return compare_turns("training step", LOOP_BAR, batches.turns[WARM_UP_STEPS:], note)


def start(code: str, argv: list[str]) -> set[str]:
    """Run `python -c code` until its `leave()`; return the modules that it imported.

    Compiled modules are kept, as they usually are: the libraries' were compiled by pip."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    result = subprocess.run(
        [sys.executable, "-c", LEAVE + code, *argv],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"the start failed: {result.stderr}")
    return set(result.stdout.split("modules:\n")[1].split())


def compare_starts(folder: Path, rounds: int, options: list[str]) -> Comparison:
    """Compare the start until the first training step with the bare import of the libraries, in
    turns.

    All images are encoded before."""
    argv = [DEMO, *START_OPTIONS, f"--output_dir={folder / 'start'}", *options]
    # not timed: these starts encode the images and fill the page cache
    num_modules = len(start(FIRST_STEP, argv))
    num_library_modules = len(start(LIBRARIES, []))
    turns = []
    for _ in range(rounds):
        begin = Moment.now()
        start(FIRST_STEP, argv)
        middle = Moment.now()
        start(LIBRARIES, [])
        turns.append(Turn(begin, middle, Moment.now()))
    note = f"{num_modules} and {num_library_modules} modules imported"
    return compare_turns("start to first step", START_BAR, turns, note)


def main() -> int:
    """Print the table and a line per bar; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each loop")
    parser.add_argument("--rounds", type=int, default=5, help="timed starts of each kind")
    # all other options go to the trainer, such as --training_dtype=bf16
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        options.append(f"--data.cache_dir={name}/cache")
        comparisons = [
            compare_loops(Path(name), arguments.steps, options),
            compare_starts(Path(name), arguments.rounds, options),
        ]
    print(f"{'':20}{'trainer':>12}{'bare':>12}{'ratio':>8}{'CPU time':>10}{'count':>7}")
    for entry in comparisons:
        times = f"{entry.trainer_seconds * 1000:9.1f} ms{entry.bare_seconds * 1000:9.1f} ms"
        ratios = f"{entry.ratio:8.3f}{entry.cpu_ratio:10.3f}"
        print(f"{entry.name:20}{times}{ratios}{entry.count:7}   {entry.note}")
    for entry in comparisons:
        verdict = "ok" if entry.is_met else "NOT OK"
        print(f"{entry.name}: {entry.ratio:.3f}, bar {entry.bar}: {verdict}")
    return int(not all(entry.is_met for entry in comparisons))


if __name__ == "__main__":
    sys.exit(main())
