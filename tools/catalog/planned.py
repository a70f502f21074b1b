"""The planned GPU memory of released models, from planned_memory.json.

benchmarks/plan_table.py writes the file, and the tables of docs/memory.md."""

import json
from dataclasses import dataclass
from pathlib import Path

from tools.tables import NO_VALUE
from training.memory.changes import Changes

PLANNED_FILE = Path(__file__).with_name("planned_memory.json")
INT8: Changes = {"model.quantization": "int8"}
NF4: Changes = {"model.quantization": "nf4"}
OFFLOADED: Changes = {
    "memory.offload_blocks": "all",
    "memory.offload_activations": True,
}
WAYS: dict[str, Changes] = {
    "bf16": {},
    "int8": INT8,
    "nf4": NF4,
    "bf16, offloaded": OFFLOADED,
    "nf4, offloaded": {**NF4, **OFFLOADED},
}
"""Way to keep the base model -> its options, the fastest one first."""
EXACT_OFFLOADED = "bf16, offloaded"
CARDS = (8, 12, 16, 24, 48, 80)
"""GB of common cards."""


@dataclass(frozen=True)
class PlannedModel:
    """A released model, and what its training needs with its recipe."""

    model: str
    family: str
    recipe: str
    """Path of the recipe."""
    hub_ids: list[str]
    sample: str
    """Size, batch and rank of the plan."""
    training: dict[str, float]
    """Way to keep the base model -> GiB."""

    def ways(self, card: float) -> list[str]:
        """Return the ways with which training fits into a card of so many GB.

        These are the first one, and the first one that is offloaded if the other is quantized."""
        fitting = [way for way in WAYS if self.training[way] <= card]
        ways = fitting[:1]
        if ways in (["int8"], ["nf4"]) and EXACT_OFFLOADED in fitting:
            ways.append(EXACT_OFFLOADED)
        return ways

    def cells(self) -> list[str]:
        """Return the ways for each of the common cards."""
        cells = []
        for card in CARDS:
            ways = self.ways(card)
            text = " or ".join(ways)
            cells.append(text or NO_VALUE)
        return cells


def planned_models() -> list[PlannedModel]:
    """Return the models of the file."""
    text = PLANNED_FILE.read_text(encoding="utf-8")
    entries = json.loads(text)
    return [PlannedModel(**entry) for entry in entries]
