"""Options that change the result and that `memory.budget` chose: a run keeps them when it is resumed.

Imports no torch.
"""

import json
from pathlib import Path

from common.atomic import write_file
from training.config import TrainConfig
from training.memory.changes import Changes, changed_config

FILE = "memory.json"
"""In output_dir."""
RESULT_CHANGES = (
    "batch_size",
    "grad_accumulation_steps",
    "model.quantization",
    "model.vae_tiling",
    "model.vae_dtype",
)
"""Options that change the result. With another batch size, other samples make a step."""


def kept_changes(config: TrainConfig) -> Changes:
    """Return the options that an earlier start of the run in output_dir chose."""
    if not config.memory.chooses_options or config.overwrite:
        return {}
    path = Path(config.output_dir) / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    return result_changes(values)


def result_changes(changes: Changes) -> Changes:
    """Return the changes that change the result."""
    selected = {}
    for name in RESULT_CHANGES:
        if name in changes:
            selected[name] = changes[name]
    return selected


def with_kept_changes(config: TrainConfig) -> TrainConfig:
    """Return the config of the run in output_dir, if the options are those that started it."""
    return changed_config(config, kept_changes(config))


def keep_changes(config: TrainConfig, changes: Changes) -> None:
    """Write the changes of the result that a run begins with."""
    kept = result_changes(changes)
    path = Path(config.output_dir) / FILE
    if not kept and not path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(kept))
