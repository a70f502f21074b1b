"""Trackers, such as W&B and TensorBoard, through Accelerate."""

import netrc
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from data.media.pictures import to_levels
from training.config import TrainConfig, to_dict

ONE_IMAGE_TRACKERS = ("aim", "clearml")
"""Trackers that take one image for each name."""


def new_tracker_id() -> str:
    """Return an id for a new run in the tracker. Checkpoints keep it, so that a resumed run stays
    one run."""
    return uuid.uuid4().hex[:12]


def has_wandb_key() -> bool:
    """Return whether wandb could log in: with WANDB_API_KEY, or an entry in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def start_tracker(accelerator: Accelerator, config: TrainConfig, tracker_id: str) -> None:
    """Start the tracker of the config. Without a key, wandb runs offline and writes into
    output_dir."""
    name = config.tracking.report_to
    if name == "none":
        return
    options: dict[str, Any] = {}
    if name == "wandb":
        if "WANDB_MODE" not in os.environ and not has_wandb_key():
            os.environ["WANDB_MODE"] = "offline"
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # artifacts wait there until they are sent
        os.environ.setdefault("WANDB_DATA_DIR", str(folder.resolve() / "wandb"))
        options["wandb"] = {
            "id": tracker_id,
            "resume": "allow",
            "dir": config.output_dir,
            "name": folder.name,
        }
    accelerator.init_trackers(
        config.tracking.project, config=flatten(to_dict(config)), init_kwargs=options
    )


def finish_trackers(accelerator: Accelerator) -> None:
    """Let the trackers send what is left. Their errors do not fail the run."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # a tracker may raise anything
            accelerator.print(
                f"note: {tracker.name} did not finish properly: {type(error).__name__}: {error}"
            )


def log_images(accelerator: Accelerator, images: dict[str, np.ndarray], step: int) -> None:
    """Send image arrays (N, H, W, 3) in [0, 1] to the trackers that take images.

    Their errors do not fail the run."""
    arrays = {name: to_levels(array) for name, array in images.items()}
    for tracker in accelerator.trackers:
        if not hasattr(tracker, "log_images"):
            continue
        values = images_for(tracker.name, arrays)
        try:
            tracker.log_images(values, step=step)
        except Exception as error:  # a tracker may raise anything
            accelerator.print(
                f"note: {tracker.name} took no images: {type(error).__name__}: {error}"
            )


def images_for(tracker_name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return arrays (N, H, W, 3) in the form that a tracker's log_images takes."""
    if tracker_name == "tensorboard":
        return dict(arrays)
    if tracker_name not in ONE_IMAGE_TRACKERS:
        return {name: list(array) for name, array in arrays.items()}
    values: dict[str, Any] = {}
    for name, array in arrays.items():
        for number, image in enumerate(array):
            values[f"{name}/{number:02d}"] = image
    return values


def flatten(config: dict, prefix: str = "") -> dict[str, Any]:
    """Return a nested config as dotted names and simple values, which every tracker accepts."""
    result: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            result |= flatten(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = (
                value if isinstance(value, int | float | str) else str(value)
            )
    return result
