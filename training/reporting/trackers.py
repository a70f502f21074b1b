"""Trackers, through Accelerate: wandb or tensorboard."""

import netrc
import os
import uuid
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from training.config import TrainConfig, to_dict
from training.reporting.history import flat


def new_id() -> str:
    """The id of a new tracker run; a checkpoint keeps it, so that a resumed run is one run in the tracker too."""
    return uuid.uuid4().hex[:12]


def has_wandb_key() -> bool:
    """Whether wandb could log in: WANDB_API_KEY, or an entry in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def start(accelerator: Accelerator, config: TrainConfig, run_id: str) -> None:
    """Starts the tracker that `config` names. wandb goes offline, into output_dir, when there is no key."""
    kind = config.tracking.report_to
    if kind == "none":
        return
    options: dict = {}
    if kind == "wandb":
        if "WANDB_MODE" not in os.environ and not has_wandb_key():
            os.environ["WANDB_MODE"] = "offline"
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        options["wandb"] = {
            "id": run_id, "resume": "allow", "dir": config.output_dir, "name": Path(config.output_dir).name,
        }  # fmt: skip
    accelerator.init_trackers(config.tracking.project, config=flat(to_dict(config)), init_kwargs=options)


def finish(accelerator: Accelerator) -> None:
    """Has the trackers send what is left. A run does not fail because one of them does."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # whatever a tracker raises
            accelerator.print(f"note: {tracker.name} did not end well: {type(error).__name__}: {error}")


def log_images(accelerator: Accelerator, images: dict[str, np.ndarray], step: int) -> None:
    """Sends image arrays (N, H, W, 3) in [0, 1] to the tracker."""
    for tracker in accelerator.trackers:
        as_bytes = {name: (array * 255).round().astype(np.uint8) for name, array in images.items()}
        tracker.log_images({name: list(a) if tracker.name == "wandb" else a for name, a in as_bytes.items()}, step=step)
