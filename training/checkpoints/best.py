"""Conclusions from the validation losses of a run: its best step, and early stopping."""

from dataclasses import dataclass

from torch import Tensor

from training.config import TrainConfig, ValidationConfig
from training.reporting.history import Validation, is_finite


@dataclass(frozen=True)
class BestWeights:
    """Weights of the step with the lowest validation loss so far, on the CPU."""

    step: int
    weights: dict[str, Tensor]


def best_step(validations: list[Validation]) -> int | None:
    """Return the first step with the lowest finite loss, or None. Step 0 does not count."""
    lowest_loss = float("inf")
    lowest_step: int | None = None
    for entry in validations:
        step, loss = int(entry["step"]), entry["loss"]
        if step > 0 and is_finite([loss]) and loss < lowest_loss:
            lowest_step, lowest_loss = step, loss
    return lowest_step


def stops_early(validations: list[Validation], config: ValidationConfig) -> bool:
    """Return whether `patience` periodic validations in a row were not lower than the lowest loss
    before them."""
    if not config.patience:
        return False
    lowest, without_improvement = float("inf"), 0
    for entry in validations:
        is_periodic = entry["step"] and entry["step"] % config.every == 0
        if not is_periodic:  # the last step of a run that was planned to be shorter
            continue
        if entry["loss"] < lowest - config.min_delta:
            lowest, without_improvement = entry["loss"], 0
        else:
            without_improvement += 1
        if without_improvement == config.patience:
            return True
    return False


def validation_errors(config: TrainConfig) -> list[str]:
    """Return the errors of options that need validation."""
    flags = {
        "--validation.patience": bool(config.validation.patience),
        "--checkpoint.keep_best": config.checkpoint.keep_best,
        "--export.weights best": config.export.weights == "best",
    }
    used_flags = ", ".join(flag for flag, is_used in flags.items() if is_used)
    if used_flags and config.objective.slider.targets:
        return [
            f"{used_flags}: the validation loss is that of captions, which says nothing about a slider. "
            "Remove the option, and compare strengths with --sample.grid"
        ]
    has_images = config.data.validation_path is not None or config.data.validation_fraction
    errors = []
    if used_flags and not has_images:
        errors.append(
            f"{used_flags}: needs validation images. Set --data.validation_path or "
            "--data.validation_fraction"
        )
    if config.validation.patience and not config.validation.every:
        errors.append(
            f"--validation.patience {config.validation.patience}: counts periodic validations. "
            "Set --validation.every too"
        )
    return errors
