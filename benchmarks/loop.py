"""What the script costs beyond training, as two ratios: its loop over a bare one, its start over
the bare imports.

`python benchmarks/loop.py` measures both on the embedded demo and exits with 1 if one is over its
bar.
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
from unittest.mock import patch

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: two threads on two busy cores wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

LOOP_BAR, START_BAR, WARM_UP = 1.03, 1.5, 5  # the first steps are not timed
DEMO = str(PROJECT / "recipes" / "demo.yaml")
# the bare loop's learning rate has no schedule; the steps are more than are timed, so there is no
# last one
LOOP_OPTIONS = [
    "--optim.lr_scheduler=constant",
    "--optim.lr_warmup_steps=0",
    "--steps=100000",
    "--checkpoint.every=0",
]

LEAVE = f"""
import os, sys; sys.path.insert(0, {str(PROJECT)!r})
def leave():
    os.write(1, "\\n".join(["", "modules:", *sys.modules]).encode())
    os._exit(0)
"""
LIBRARIES = """
import torch, accelerate, datasets, peft, safetensors.torch
from diffusers import DDPMScheduler, UNet2DConditionModel
import PIL.Image, pydantic, tqdm, tyro, yaml
leave()
"""
# train_lora.py until its first batch is in hand
FIRST_STEP = """
import train_lora
train = train_lora.train
def until_the_first_step(*arguments):
    from training.run import Run
    batches = Run.batches
    def first(run):
        next(batches(run))
        leave()
        yield
    Run.batches = first
    train(*arguments)
train_lora.train = until_the_first_step
sys.exit(train_lora.main() or "the script ended without a step")
"""


@dataclass(frozen=True)
class Comparison:
    """Median seconds of the script's way and of the bare one, and the ratio of the medians of their
    CPU time."""

    what: str
    bar: float
    ours: float
    bare: float
    cpu_ratio: float
    count: int
    note: str

    @property
    def ratio(self) -> float:
        return self.ours / self.bare


def now() -> tuple[float, float]:
    """Seconds by the clock, and of CPU time: this process and the children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime


def comparison(what: str, bar: float, marks: list[tuple], note: str) -> Comparison:
    """From `now()` before the script's turn, between the two and after the bare one's, for each
    pair of turns."""
    ours, bare = (
        [median(m[i + 1][clock] - m[i][clock] for m in marks) for clock in (0, 1)] for i in (0, 1)
    )
    return Comparison(what, bar, ours[0], bare[0], ours[1] / bare[1], len(marks), note)


class BareLoop:
    """The training step of the script's run written by hand with diffusers, PEFT and torch, on a
    model of its own."""

    def __init__(self, run):
        import torch
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from peft import LoraConfig, inject_adapter_in_model

        config, layers = run.config, list(run.parts.adapted.specs())
        path, self.max_grad_norm = config.model.path, config.optim.max_grad_norm
        self.dtype = torch.bfloat16 if config.training_dtype == "bf16" else torch.float32
        self.scale = UNet2DConditionModel.load_config(path, subfolder="vae")["scaling_factor"]
        self.scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler")
        unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=self.dtype)
        unet.requires_grad_(False)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        unet.to(memory_format=torch.channels_last).train()
        lora = LoraConfig(r=config.rank, lora_alpha=config.adapter.alpha, target_modules=layers)
        self.unet = inject_adapter_in_model(lora, unet)
        self.parameters = [p for p in unet.parameters() if p.requires_grad]
        mine = dict(unet.named_parameters())
        for name, other in run.parts.adapted.named_parameters().items():
            theirs = name.replace("lora_down", "lora_A.default").replace(
                "lora_up", "lora_B.default"
            )
            mine[theirs].data = other.detach().clone()
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.learning_rate, weight_decay=0.01, fused=True
        )

    def step(self, batch):
        """One update; returns the loss."""
        import torch

        timestep = (batch.quantile * len(self.scheduler.alphas_cumprod)).long()
        noisy = self.scheduler.add_noise(batch.latents * self.scale, batch.noise, timestep).to(
            self.dtype
        )
        prompt = batch.cond["prompt_embeds"].to(self.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            prediction = self.unet(noisy, timestep, prompt, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(prediction.float(), batch.noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def compare_loops(folder: Path, steps: int, options: list[str]) -> Comparison:
    """Runs train_lora.train; after each of its steps the bare loop takes one on the same batch, and
    both are timed.

    The script's time is from asking for a batch to asking for the next one, so it includes loading.
    """
    import train_lora
    from training.cli import load_config
    from training.stopping.signals import Interruptions
    from training.trainer import Run

    marks, losses, original = [], [], Run.batches

    def batches(run: Run) -> Iterator:
        source, loop, bare_losses = original(run), BareLoop(run), []
        for _ in range(WARM_UP + steps):
            before = now()
            batch = next(source)
            yield batch
            between = now()
            bare_losses.append(loop.step(batch))
            marks.append((before, between, now()))
        losses.extend(
            zip([*run.history.micro_losses, *run.pending.losses], bare_losses, strict=True)
        )

    config = load_config([DEMO, *LOOP_OPTIONS, f"--output_dir={folder / 'loop'}", *options])
    end = patch.multiple(
        "training.finish", finish=lambda run: None, write=lambda run, finished: None
    )
    quiet = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
    with patch.object(Run, "batches", batches), end, quiet[0], quiet[1]:
        status = train_lora.run_training(config, Interruptions())
    assert status == 0, "the run failed"
    apart = max(abs(float(a) / float(b) - 1) for a, b in losses)
    if apart > 1e-3:
        raise RuntimeError(
            f"the loops do not do the same work: their losses differ by up to {apart:.0e}"
        )
    return comparison(
        "training step", LOOP_BAR, marks[WARM_UP:], f"losses differ by at most {apart:.0e}"
    )


def start(code: str, argv: list[str]) -> set[str]:
    """Runs `python -c code` until its `leave()`; returns the modules it has imported by then."""
    result = subprocess.run(
        [sys.executable, "-c", LEAVE + code, *argv], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(f"the start failed: {result.stderr}")
    return set(result.stdout.split("modules:\n")[1].split())


def compare_starts(folder: Path, rounds: int, options: list[str]) -> Comparison:
    """Start to first training step with everything encoded, against the bare import of the
    libraries, in turns."""
    argv = [DEMO, "--steps=1", "--no_preview", f"--output_dir={folder / 'start'}", *options]
    counts = (
        len(start(FIRST_STEP, argv)),
        len(start(LIBRARIES, [])),
    )  # encodes the images and fills the page cache
    marks = [
        (now(), start(FIRST_STEP, argv) and now(), start(LIBRARIES, []) and now())
        for _ in range(rounds)
    ]
    return comparison(
        "start to first step", START_BAR, marks, "{} and {} modules imported".format(*counts)
    )


def main() -> int:
    """Prints the table and a line per bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each loop")
    parser.add_argument("--rounds", type=int, default=5, help="timed starts of each kind")
    given, options = (
        parser.parse_known_args()
    )  # what is left goes to the script, such as --training_dtype=bf16
    with tempfile.TemporaryDirectory() as name:
        options.append(f"--data.cache_dir={name}/cache")
        loops = compare_loops(Path(name), given.steps, options)
        starts = compare_starts(Path(name), given.rounds, options)
    print(f"{'':20}{'script':>12}{'bare':>12}{'ratio':>8}{'CPU time':>10}{'count':>7}")
    for c in (loops, starts):
        times = f"{c.ours * 1000:9.1f} ms{c.bare * 1000:9.1f} ms"
        print(f"{c.what:20}{times}{c.ratio:8.3f}{c.cpu_ratio:10.3f}{c.count:7}   {c.note}")
    for c in (loops, starts):
        print(f"{c.what}: {c.ratio:.3f}, bar {c.bar}: {'ok' if c.ratio <= c.bar else 'NOT OK'}")
    return int(any(c.ratio > c.bar for c in (loops, starts)))


if __name__ == "__main__":
    sys.exit(main())
