"""How the update of a frozen weight is parameterized. Imports nothing of ours; importing this page
imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_algos.adapter import Adapter

ALGORITHMS: dict[str, str] = {
    "LoRA": "lora_algos.lora",
    "DoRA": "lora_algos.dora",
    "LoHa": "lora_algos.loha",
    "LoKr": "lora_algos.lokr",
    "OFT": "lora_algos.oft",
    "BOFT": "lora_algos.boft",
    "GLoRA": "lora_algos.glora",
    "Full": "lora_algos.full",
}
"""`--algorithm` -> the module that implements it: a new algorithm is one file and one line here."""


def get_algorithm(name: str) -> "type[Adapter]":
    """The implementation of `name`, a key of `ALGORITHMS`."""
    return import_module(ALGORITHMS[name]).ADAPTER
