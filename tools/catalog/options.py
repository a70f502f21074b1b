"""Options of `models`. Imports no torch, so that it answers at once."""

from dataclasses import dataclass
from typing import ClassVar

import tyro

MAX_CARD = 1000
"""GB of the largest card that an option may name."""


@dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """List the models that have a recipe, and the options with which their training fits into a card."""

    command: ClassVar[str] = "models"

    card: float | None = None
    """Memory of your card in GB. None: show common cards."""
    json: bool = False
    """Print JSON instead of a table."""

    def errors(self) -> list[str]:
        """Return the errors in the values."""
        if self.card is None or 0 < self.card <= MAX_CARD:
            return []
        return [f"--card {self.card:g}: expected GB above 0, at most {MAX_CARD}"]


def parse_models_options(argv: list[str]) -> ModelsOptions:
    """Return the options in `argv`, which begins with the command.

    tyro ends the program with exit code 2 for wrong names and types."""
    return tyro.cli(
        ModelsOptions,
        args=argv[1:],
        use_underscores=True,
        prog=f"train_lora.py {ModelsOptions.command}",
    )
