"""Options of the command `plan`. Imports no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from models.config import is_hub_id, path_error
from models.released import find_released_model, released_hub_ids
from tools.run_options import RunOptions


@dataclass(frozen=True, kw_only=True)
class PlanOptions(RunOptions):
    """Print the memory that a run with these options needs, phase by phase. Shapes are counted; no
    weights, no images, no GPU and no network are needed."""

    command: ClassVar[str] = "plan"
    module: ClassVar[str] = "tools.planning.plan"

    device: Literal["gpu", "cpu"] = "gpu"
    """Device of the planned run."""
    json: bool = False
    """Print JSON instead of a table."""

    def errors(self) -> list[str]:
        """Return the errors in the model's path and the budget."""
        errors = []
        model = self.config.model
        error = path_error(model)
        is_known = model.path is not None and find_released_model(model.path) is not None
        if error is not None and not is_known:
            errors.append(f"--model.path{error}")
        elif model.path is not None and is_hub_id(model.path) and not is_known:
            known_ids = ", ".join(released_hub_ids())
            errors.append(
                f"--model.path {model.path}: the configuration of this model is not stored here; "
                f"expected a local model, or one of {known_ids}"
            )
        if self.config.memory.budget == "auto":
            errors.append(
                "--memory.budget auto: a plan looks at no GPU; expected a size such as 12GB"
            )
        if model.train_text_encoder:
            errors.append("--model.train_text_encoder: cannot be planned yet. Remove the option")
        if self.config.existing_lora is not None:
            errors.append(
                "--existing_lora: cannot be planned yet. Remove the option, and set --algorithm and "
                "--rank to those of the file"
            )
        return errors
