"""Whose run an output_dir holds. No torch here: a wrong output_dir is refused at once."""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import yaml

from common.errors import ConfigError
from training.config import TrainConfig, to_dict

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
METRICS, TRACKER, SAMPLES = "metrics.jsonl", "tracker.json", "samples"
SAVE_FILE = "save"
"""A file of this name in output_dir asks for a checkpoint."""
# May change between two sittings of one run: they do not change what is learned, or only how far it goes. The number of
# micro-batches per step, which grad_accumulation_steps and the number of processes make together, is checked on resume.
FREE = {
    "output_dir", "resume", "steps", "grad_accumulation_steps", "gradient_checkpointing", "checkpoint_depth",
    "checkpoint_policy", "bypass_mode", "lora_dtype",
    "validation.every", "validation.patience", "validation.min_delta", "validation.quantiles",
    "preview", "checkpoint", "tracking", "export", "distributed", "data.cache_dir", "data.num_workers",
    "data.validation_images", "ema.use",
}  # fmt: skip
COMPARED = {"ema.use", "validation.quantiles", "data.validation_images"}
"""Those that make validation losses of another kind, so not where these tell the best step."""


def check_output_dir(config: TrainConfig) -> None:
    """Raises ConfigError if output_dir holds a different run, or one that is not to be resumed."""
    folder = Path(config.output_dir)
    if config.overwrite:
        return
    if config.resume == "never" and not restarted(folder) and any((folder / CHECKPOINTS).glob("step_*")):
        raise ConfigError(
            f"{folder} holds a run with checkpoints, and --resume never would lose them. Choose another --output_dir, "
            "or give --overwrite to start again there"
        )
    try:
        there = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError:
        return
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder / CONFIG_FILE} is not readable: {error}") from error
    free = FREE - COMPARED if config.keeps_best or config.validation.patience else FREE
    differing = differences(there if isinstance(there, dict) else {}, to_dict(config), free)
    if differing:
        raise ConfigError(
            "\n  ".join([f"{folder} holds a different run", *differing])
            + "\nChoose another --output_dir, or give --overwrite to start again there"
        )


def differences(there: dict, here: dict, free: set[str]) -> list[str]:
    """Options that are not `free` to differ and do, one line each."""
    old = dict(fixed(there, free))
    why = dict.fromkeys(COMPARED, ", where the best step is told by validation losses")
    return [
        f"{name}: {old.get(name)} there, {new} here{why.get(name, '')}"
        for name, new in fixed(here, free)
        if old.get(name) != new
    ]


def fixed(config: dict, free: set[str], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted names and values of the options that are not `free` to change between two sittings of one run."""
    for name, value in config.items():
        dotted = f"{prefix}{name}"
        if dotted in free:
            continue
        if isinstance(value, dict):
            yield from fixed(value, free, f"{dotted}.")
        else:
            yield dotted, value


def fingerprint(config: TrainConfig) -> str:
    """The same for all sittings of one run."""
    text = json.dumps(sorted(fixed(to_dict(config), FREE)), default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@contextmanager
def held(config: TrainConfig, wait: float, say: Callable[[str], object]) -> Iterator[None]:
    """Keeps other runs out of output_dir; raises ConfigError if one is still there after `wait` seconds, or has left
    what is not this run's.

    The lock is the process's: it ends with it however it ends. Where a file system knows no locks, there is none. A
    folder in which nothing was written is not left behind.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    try:
        with path.open("a+b") as file:
            wait_for_lock(file, folder, wait, say)
            check_output_dir(config)
            yield
            file.truncate(0)
    finally:
        if [*folder.iterdir()] == [path]:
            path.unlink()
            folder.rmdir()


def wait_for_lock(file: IO[bytes], folder: Path, wait: float, say: Callable[[str], object]) -> None:
    last, said = time.monotonic() + wait, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > last:
                raise ConfigError(f"{folder} is in use by another run. Choose another --output_dir") from None
            if not said:
                say(f"{folder} is in use by another run: waiting up to {wait:.0f} s for it to end")
            said = True
            time.sleep(0.2)
        except OSError as error:
            say(f"note: {folder} cannot be locked ({error.strerror}): do not start a second run there")
            return


def launcher() -> bytes:
    """What is the same for all processes that one launcher starts, one after the other, on this machine."""
    try:
        started = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = ""
    return f"{socket.gethostname()} {os.getppid()} {started}".encode()


def restarted(folder: Path) -> bool:
    """Whether the launcher of this process has started the run in `folder` before: then it is to go on, whatever the
    command says of overwriting."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        return (folder / LOCK).read_bytes() == launcher()
    except OSError:
        return False


def note_start(folder: Path) -> None:
    (folder / LOCK).write_bytes(launcher())


def clear(folder: Path) -> None:
    """Removes the state of the run in `folder`; its exported files stay until they are replaced."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    for name in (CONFIG_FILE, METRICS, TRACKER):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / SAMPLES, ignore_errors=True)
