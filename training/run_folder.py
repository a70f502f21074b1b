"""The output folder of a run: its file names, its lock, and whether it may be used for a config.

This module imports no torch, so that a wrong output_dir is reported at once.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from common.config_fields import changeable_options
from common.errors import ConfigError, bullet_list
from training.config import TrainConfig, to_dict

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"
LAUNCHER_FILE = ".launcher"
"""Identifies the launcher that started the run."""
METRICS_FILE, TRACKER_FILE, SAMPLES_FOLDER = "metrics.jsonl", "tracker.json", "samples"
SAMPLE_LOG = "sample_log"
"""Folder with the training samples of each process."""
LOSS_FILE, LOSS_CHART, PREVIEW = "loss.json", "loss.png", "preview.png"
STATUS_FILE, EVENTS_FILE = "status.json", "events.jsonl"
REPORT, FACTS_FILE = "report.html", "report.json"
WORKFLOW, WORKFLOW_API = "workflow.json", "workflow_api.json"
"""Workflows for ComfyUI's editor, and for its server."""
RUN_FILES = (
    CONFIG_FILE,
    METRICS_FILE,
    TRACKER_FILE,
    LOSS_FILE,
    LOSS_CHART,
    PREVIEW,
    EVENTS_FILE,
    REPORT,
    FACTS_FILE,
    WORKFLOW,
    WORKFLOW_API,
)
"""Files of one run, which another run in the same folder removes."""
HUB_FOLDER = "hub"
"""Folder for the Hugging Face Hub."""
STEP_SUFFIX = "-step{:08d}"
"""Follows the name of the adapter in files of a single step."""
SAVE_FILE = "save"
"""A file with this name in output_dir requests a checkpoint."""
NEW_FOLDER_HINT = "Choose another --output_dir, or use --overwrite to start again there"
CHANGEABLE_OPTIONS = frozenset(changeable_options(TrainConfig))
"""Options that may differ when a run is resumed. The number of micro-batches per step, which
grad_accumulation_steps and the number of processes determine, is checked when the checkpoint is
loaded."""
VALIDATION_OPTIONS = frozenset(
    {"ema.evaluate_with", "validation.noise_levels", "data.validation_path"}
)
"""Options that make validation losses incomparable, so they cannot change where these determine the
best step."""


def is_run_folder(folder: Path) -> bool:
    """Return whether a folder has files of a run that has begun to train."""
    return (folder / CONFIG_FILE).is_file()


def check_output_dir(config: TrainConfig) -> None:
    """Raise ConfigError if output_dir holds a different run, or a run that must not be resumed."""
    folder = Path(config.output_dir)
    if config.overwrite:
        return
    has_checkpoints = any((folder / CHECKPOINTS).glob("step_*"))
    if config.resume == "never" and has_checkpoints and not is_restart(folder):
        raise ConfigError(
            f"--output_dir {folder}: holds checkpoints, which --resume never would lose. "
            f"{NEW_FOLDER_HINT}"
        )
    try:
        saved_config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError:
        return
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--output_dir {folder}: {CONFIG_FILE} is not readable: {error}. {NEW_FOLDER_HINT}"
        ) from error
    changeable = CHANGEABLE_OPTIONS
    if config.keeps_best_weights or config.validation.patience:
        changeable = changeable - VALIDATION_OPTIONS
    saved_values = saved_config if isinstance(saved_config, dict) else {}
    differences = option_differences(saved_values, to_dict(config), changeable)
    if differences:
        heading = f"--output_dir {folder}: holds a different run"
        raise ConfigError(bullet_list(heading, differences) + f"\n{NEW_FOLDER_HINT}")


def option_differences(saved: dict, config: dict, changeable: frozenset[str]) -> list[str]:
    """Return one line for each option that must not change and differs."""
    saved_options = dict(fixed_options(saved, changeable))
    lines = []
    for name, value in fixed_options(config, changeable):
        saved_value = saved_options.get(name)
        if saved_value == value:
            continue
        line = f"{name} is {saved_value} there, {value} here"
        if name in VALIDATION_OPTIONS:
            line += ", and the best step depends on it"
        lines.append(line)
    return lines


def fixed_options(
    config: dict, changeable: frozenset[str], prefix: str = ""
) -> Iterator[tuple[str, object]]:
    """Yield dotted names and values of the options that must not change when a run is resumed."""
    for name, value in config.items():
        dotted_name = f"{prefix}{name}"
        if dotted_name in changeable:
            continue
        if isinstance(value, dict):
            yield from fixed_options(value, changeable, f"{dotted_name}.")
        else:
            yield dotted_name, value


def config_hash(config: TrainConfig) -> str:
    """Return a hash of the options that must not change when a run is resumed."""
    text = json.dumps(sorted(fixed_options(to_dict(config), CHANGEABLE_OPTIONS)), default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@contextmanager
def locked_folder(
    config: TrainConfig, wait_seconds: float, say: Callable[[str], object]
) -> Iterator[None]:
    """Keep other runs out of output_dir for a block.

    Raises ConfigError if another run still uses the folder after `wait_seconds`, or has left a
    different run in it. The lock ends with the process, however it ends. On a file system without
    locks a note is printed instead. A folder in which nothing was written is removed."""
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output_dir {folder}: cannot be created: {error}. Choose another folder"
        ) from error
    # a soft lock would outlive a killed run
    lock = FileLock(folder / LOCK_FILE, fallback_to_soft=False)
    try:
        acquire(lock, folder, wait_seconds, say)
        check_output_dir(config)
        yield
        (folder / LAUNCHER_FILE).unlink(missing_ok=True)
    finally:
        lock.release()
        remove_if_empty(folder)


def acquire(
    lock: FileLock, folder: Path, wait_seconds: float, say: Callable[[str], object]
) -> None:
    """Acquire the lock; say so if this takes time."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{folder} is in use by another run: waiting up to {wait_seconds:.0f} s for it to end")
        try:
            lock.acquire(timeout=wait_seconds, poll_interval=0.2)
        except Timeout:
            raise ConfigError(
                f"--output_dir {folder}: is in use by another run. Choose another --output_dir"
            ) from None
    except (OSError, NotImplementedError) as error:
        say(f"note: {folder} cannot be locked ({error}). Do not start a second run there")


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing but the lock file."""
    lock_path = folder / LOCK_FILE
    if [*folder.iterdir()] == [lock_path]:
        lock_path.unlink()
        folder.rmdir()


def launcher_id() -> bytes:
    """Return an id that all processes have in common that one launcher starts, one after the other."""
    try:
        start_time = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        start_time = ""
    return f"{socket.gethostname()} {os.getppid()} {start_time}".encode()


def is_restart(folder: Path) -> bool:
    """Return whether this process's launcher started the run in `folder` before.

    It then continues the run, even with --overwrite."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        return (folder / LAUNCHER_FILE).read_bytes() == launcher_id()
    except OSError:
        return False


def write_launcher_id(folder: Path) -> None:
    (folder / LAUNCHER_FILE).write_bytes(launcher_id())


def clear_run(folder: Path) -> None:
    """Remove the state and the pictures of the run in `folder`.

    Exported adapters stay until they are replaced."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / SAMPLES_FOLDER, ignore_errors=True)
    shutil.rmtree(folder / SAMPLE_LOG, ignore_errors=True)
