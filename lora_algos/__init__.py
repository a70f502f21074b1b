"""Algorithms: parameterizations of the update of a frozen weight.

The package imports only common/. Importing this module imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_algos.algorithm import Algorithm

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
"""`--algorithm` -> the module that states it. A new algorithm is one file and one line here."""
NORM_ALGORITHM = "Full"
"""Algorithm for the normalization layers that `--adapter.train_norms` adds."""


def get_algorithm(name: str) -> "Algorithm":
    """Return the algorithm `name`, a key of `ALGORITHMS`."""
    return import_module(ALGORITHMS[name]).ALGORITHM
