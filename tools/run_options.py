"""Options of commands that take the options of a run, and a few more. Imports no torch."""

from dataclasses import asdict, dataclass, replace
from typing import Annotated, ClassVar

import tyro

from common.errors import ConfigError, error_list
from training.cli import parse_options, validate_options
from training.config import TrainConfig
from training.config_errors import input_errors


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a command that takes the options of a run."""

    command: ClassVar[str]
    module: ClassVar[str]
    """Module whose function `run` takes the options."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]

    def errors(self) -> list[str]:
        """Return the errors in the paths. No file is opened."""
        return input_errors(self.config)


def read_run_options(command: type[RunOptions], argv: list[str]) -> RunOptions:
    """Return the options of a command in `argv`, which begins with its name.

    Raises ConfigError naming all errors."""
    program = f"train_lora.py {command.command} [RECIPE]"
    parsed = parse_options(argv[1:], lambda config: command(config=config), program)
    values = asdict(parsed.config)
    config = validate_options(values, source="the command line", prefix="--")
    options = replace(parsed, config=config)
    errors = options.errors()
    if errors:
        raise ConfigError(error_list("cannot start", errors))
    return options
