"""Whose run an output_dir holds. No torch here: a wrong output_dir is refused at once."""

import shutil
from pathlib import Path

import yaml

from training.config import ConfigError, TrainConfig, to_dict

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
# May change between two sittings of one run: they do not change what is learned, or only how far it goes. The number of
# micro-batches per step, which grad_accumulation_steps and the number of processes make together, is checked on resume.
FREE = {
    "output_dir", "resume", "steps", "grad_accumulation_steps", "gradient_checkpointing", "checkpoint_depth",
    "checkpoint_policy", "bypass_mode", "lora_dtype", "validation",
    "preview", "checkpoint", "tracking", "export", "data.cache_dir", "data.num_workers", "data.validation_images",
}  # fmt: skip


def check_output_dir(config: TrainConfig) -> None:
    """Raises ConfigError if output_dir holds a different run, or one that is not to be resumed."""
    folder = Path(config.output_dir)
    if config.overwrite:
        return
    if not config.resume and any((folder / CHECKPOINTS).glob("step_*")):
        raise ConfigError(
            f"{folder} holds a run with checkpoints, and --no_resume would lose them. Choose another --output_dir, or "
            "give --overwrite to start again there"
        )
    try:
        there = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError:
        return
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder / CONFIG_FILE} is not readable: {error}") from error
    differing = differences(there if isinstance(there, dict) else {}, to_dict(config))
    if differing:
        raise ConfigError(
            "\n  ".join([f"{folder} holds a different run", *differing])
            + "\nChoose another --output_dir, or give --overwrite to start again there"
        )


def differences(there: dict, here: dict, prefix: str = "") -> list[str]:
    """Options that matter and differ, one line each."""
    lines: list[str] = []
    for name in here:
        dotted = f"{prefix}{name}"
        if dotted in FREE:
            continue
        old, new = there.get(name), here[name]
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{dotted}.")
        elif old != new:
            lines.append(f"{dotted}: {old} there, {new} here")
    return lines


def clear(folder: Path) -> None:
    """Removes the state of the run in `folder`; its exported files stay until they are replaced."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
