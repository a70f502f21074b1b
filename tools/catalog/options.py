"""Options of `models`. Imports no torch, so that it answers at once."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro
from tyro.conf import Positional, arg

from models import FAMILIES

MAX_CARD = 1000
"""GB of the largest card that an option may name."""


@dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """List the models that have a recipe, and the options with which their training fits into a card."""

    command: ClassVar[str] = "models"

    family: Annotated[Positional[str | None], arg(metavar="FAMILY")] = None
    """Show only this model family, with its released models and how it is tested."""
    card: float | None = None
    """Memory of your card in GB. None: show common cards."""
    json: bool = False
    """Print JSON instead of a table."""

    def errors(self) -> list[str]:
        """Return the errors in the values."""
        errors = []
        if self.card is not None and not 0 < self.card <= MAX_CARD:
            errors.append(f"--card {self.card:g}: expected GB above 0, at most {MAX_CARD}")
        if self.family is not None and self.family not in FAMILIES:
            names = ", ".join(sorted(FAMILIES))
            errors.append(f"{self.family}: is no model family. The families are {names}")
        return errors


def parse_models_options(argv: list[str]) -> ModelsOptions:
    """Return the options in `argv`, which begins with the command.

    tyro ends the program with exit code 2 for wrong names and types."""
    return tyro.cli(
        ModelsOptions,
        args=argv[1:],
        use_underscores=True,
        prog=f"train_lora.py {ModelsOptions.command}",
    )
