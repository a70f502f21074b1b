"""The planned GPU memory of released models, from planned_memory.json.

benchmarks/plan_table.py writes the file, and the tables of docs/memory.md."""

import json
from dataclasses import dataclass
from pathlib import Path

PLANNED_FILE = Path(__file__).with_name("planned_memory.json")
OFFLOAD = ("--memory.offload_blocks all", "--memory.offload_activations")
WAYS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "int8": ("--model.quantization int8",),
    "nf4": ("--model.quantization nf4",),
    "bf16, offloaded": OFFLOAD,
    "nf4, offloaded": ("--model.quantization nf4", *OFFLOAD),
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


def planned_models() -> list[PlannedModel]:
    """Return the models of the file."""
    text = PLANNED_FILE.read_text(encoding="utf-8")
    entries = json.loads(text)
    return [PlannedModel(**entry) for entry in entries]
