"""A few steps of a tiny model of each family on a device, for benchmarks/gpu.py.

`python benchmarks/gpu_families.py OUT --device cuda [--only TEXT] [OPTIONS OF THE TRAINER]` trains
in one process and writes the losses of each model to OUT, a JSON file. Random numbers of a step are
drawn on the CPU, so that the losses of two devices can be compared.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

STEPS = 3
IMAGES = PROJECT / "tests" / "fixtures" / "twemoji" / "validation"


def losses_of_families(
    device: str, only: str, trainer_options: list[str]
) -> dict[str, list[float] | str]:
    """Return name of the model -> the loss of each step, or the error."""
    import torch
    from helpers.family_cases import cases, folder_of
    from helpers.project import write_animations

    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    results: dict[str, list[float] | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        video_folder = write_animations(Path(folder) / "videos")
        for case in cases():
            if only not in str(case):
                continue
            images = video_folder if case.first_frame else IMAGES
            options = [*case.options, f"--data.path={images}", f"--model.path={folder_of(case)}"]
            if case.first_frame:
                options.append("--data.frames=9")
            results[str(case)] = train(Path(folder) / str(case), [*options, *trainer_options])
            if device == "cuda":
                torch.cuda.empty_cache()
    return results


def train(folder: Path, options: list[str]) -> list[float] | str:
    """Train a LoRA; return the loss of each step, or what was printed if the run failed."""
    from helpers.project import reset_accelerate

    import train_lora

    reset_accelerate()
    settings = [
        f"--output_dir={folder}", f"--data.cache_dir={folder}-cache", "--data.num_workers=0",
        f"--steps={STEPS}", "--batch_size=2", "--rank=4", "--no_preview", "--data.resolution=32",
        f"--tracking.log_every={STEPS}", "--checkpoint.every=0", "--validation.every=0",
    ]  # fmt: skip
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        refusing_waits_in_steps(),
    ):
        exit_code = train_lora.main([*settings, *options])
    if exit_code:
        return output.getvalue()[-2000:]
    content = json.loads((folder / "loss.json").read_text(encoding="utf-8"))
    losses: list[float] = content["loss_per_step"]
    return losses


@contextlib.contextmanager
def refusing_waits_in_steps() -> Iterator[None]:
    """Let the steps of a block fail if the host waits for the GPU; the first step may wait."""
    import torch

    from training.trainer import Trainer

    train_step = Trainer.train_step

    def checked_step(trainer: Trainer, batches: Iterator) -> None:
        if trainer.state.step == 0 or not torch.cuda.is_available():
            train_step(trainer, batches)
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            train_step(trainer, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with mock.patch.object(Trainer, "train_step", checked_step):
        yield


def main() -> int:
    """Train, and write the losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file for the losses")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", help="train only models whose name contains this")
    options, trainer_options = parser.parse_known_args()
    results = losses_of_families(options.device, options.only, trainer_options)
    options.out.write_text(json.dumps(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
