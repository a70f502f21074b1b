"""What is adapted. Imports nothing of ours; importing this page imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.base import ModelFamily
    from models.config import ModelConfig

FAMILIES: dict[str, str] = {
    "sd15": "models.sd15",
}
"""`--model.family` -> the module that implements it: a new family is one file, one line here and a recipe."""


def get_family(config: "ModelConfig") -> "ModelFamily":
    """The family that `config` names, bound to its model path."""
    return import_module(FAMILIES[config.family]).FAMILY(config)
