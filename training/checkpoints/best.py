"""What the validation losses of a run say: which step was the best, and whether to stop. Functions of the history."""

from dataclasses import dataclass

from torch import Tensor

from training.config import TrainConfig, ValidationConfig
from training.reporting.history import is_finite

Validations = list[dict[str, float]]


@dataclass(frozen=True)
class Best:
    """The weights that were shown to the lowest validation loss so far, on the CPU."""

    step: int
    weights: dict[str, Tensor]


def best_step(validations: Validations) -> int | None:
    """The first step of the lowest loss; None before there is one. Step 0, which trained nothing, is none."""
    losses = {int(v["step"]): v["loss"] for v in validations if v["step"] and is_finite([v["loss"]])}
    return min(losses, key=losses.__getitem__, default=None)


def is_over(validations: Validations, config: ValidationConfig) -> bool:
    """Whether patience has run out: in so many regular validations no loss was `min_delta` below the lowest before."""
    if not config.patience:
        return False
    lowest, waited = float("inf"), 0
    for entry in validations:
        if not entry["step"] or entry["step"] % config.every:
            continue  # the last of a run that was to be shorter
        if entry["loss"] < lowest - config.min_delta:
            lowest, waited = entry["loss"], 0
        else:
            waited += 1
        if waited == config.patience:
            return True
    return False


def validation_faults(config: TrainConfig) -> list[str]:
    """What is asked of a validation that there is not."""
    wanted = {
        "--validation.patience": bool(config.validation.patience),
        "--checkpoint.best": config.checkpoint.best,
        "--export.which best": config.export.which == "best",
    }
    flags = ", ".join(flag for flag, is_wanted in wanted.items() if is_wanted)
    faults = []
    if flags and config.data.validation_images is None and not config.data.validation_share:
        faults.append(f"{flags}: there are no images to validate on. Give --data.validation_images or "
                      "--data.validation_share")  # fmt: skip
    if config.validation.patience and not config.validation.every:
        faults.append("--validation.patience: counts validations during the run. Give --validation.every")
    return faults
