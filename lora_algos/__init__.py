"""How the update of a frozen weight is parameterised. Imports nothing of ours; importing this page imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_algos.base import Algorithm

ALGORITHMS: dict[str, str] = {
    "LoRA": "lora_algos.lora",
}
"""`--algorithm` -> the module that implements it: a new algorithm is one file and one line here."""


def get_algorithm(name: str) -> "Algorithm":
    """The implementation of `name`, a key of `ALGORITHMS`."""
    return import_module(ALGORITHMS[name]).ALGORITHM
