"""Weights of the last exported steps, kept until the grid of steps and strengths is drawn.

Exported files may have another algorithm or less precision, and name their layers as other programs do.
"""

import re
import shutil
from pathlib import Path

from safetensors.torch import load_file, save

from common.atomic import write_file
from training.run_folder import CHECKPOINTS
from training.sampling.samples import Weights

FOLDER = "grid"
NAME = re.compile(r"step_(\d+)\.safetensors")


def keep_weights(output_dir: Path, step: int, weights: Weights, count: int) -> None:
    """Write the weights of a step, and remove all but the last `count` steps up to this one."""
    folder = output_dir / CHECKPOINTS / FOLDER
    path = folder / f"step_{step:08d}.safetensors"
    content = save(weights)
    write_file(path, content)
    paths = kept_paths(output_dir)
    earlier_steps = steps_up_to(step, paths)
    for outdated_step in earlier_steps[:-count]:
        outdated_path = paths[outdated_step]
        outdated_path.unlink(missing_ok=True)


def steps_up_to(last_step: int, paths: dict[int, Path]) -> list[int]:
    """Return the steps that have a file, in their order, without those after `last_step`."""
    return [step for step in paths if step <= last_step]


def kept_paths(output_dir: Path) -> dict[int, Path]:
    """Return the files by step, in the order of the steps."""
    folder = output_dir / CHECKPOINTS / FOLDER
    paths: dict[int, Path] = {}
    for path in sorted(folder.glob("step_*")):
        match = NAME.fullmatch(path.name)
        if match is None:
            continue
        step = int(match[1])
        paths[step] = path
    return paths


def read_weights(output_dir: Path, step: int) -> Weights:
    """Return the weights of a step."""
    paths = kept_paths(output_dir)
    path = paths[step]
    return load_file(path)


def remove_weights(output_dir: Path) -> None:
    """Remove all files. WHEN: after the grid was drawn."""
    shutil.rmtree(output_dir / CHECKPOINTS / FOLDER, ignore_errors=True)
