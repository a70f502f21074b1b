"""lora_algos/frozen_weight.py is the only reader of a frozen weight's numbers, and reads them without a copy."""

import ast
from pathlib import Path

import pytest
import torch
from helpers.project import PROJECT
from torch import nn

from lora_algos.frozen_weight import (
    frozen_weight,
    stored_weight,
    weight_values,
    write_frozen_weight,
)

READER = "lora_algos/frozen_weight.py"
FACTS = {"shape", "dtype", "device", "ndim", "is_meta"}
"""Attributes of a weight that are not its numbers."""
OTHER_WEIGHTS = {
    ("lora_algos/peft_layers.py", "self.lora_B[ADAPTER_NAME]"),
    ("lora_algos/peft_layers.py", "self.lora_A[ADAPTER_NAME]"),
    ("lora_algos/peft_layers.py", "self.lora_magnitude_vector[ADAPTER_NAME]"),
    ("adapter_files/reader.py", "self"),
}
"""(File, owner) of weights that are no layer's own: PEFT's factors, and a weight that was read already."""
SOURCES = [
    path
    for folder in ("lora_algos", "adapter_files")
    for path in sorted((PROJECT / folder).glob("*.py"))
]


def numbers_read(source: str) -> list[str]:
    """The owner of each `owner.weight` whose numbers are read; `saved` holds the tensors of a backward pass."""
    tree = ast.parse(source)
    facts = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in FACTS
    }
    reads = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "weight"
        and isinstance(node.ctx, ast.Load)
    ]
    owners = [ast.unparse(node.value) for node in reads if node not in facts]
    return [owner for owner in owners if owner != "saved"]


def reads_of(path: Path) -> set[tuple[str, str]]:
    name = str(path.relative_to(PROJECT))
    return {(name, owner) for owner in numbers_read(path.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_only_one_file_reads_the_numbers_of_a_weight(path):
    if str(path.relative_to(PROJECT)) == READER:
        assert reads_of(path)
    else:
        assert reads_of(path) <= OTHER_WEIGHTS


def test_the_list_of_other_weights_is_up_to_date():
    assert not OTHER_WEIGHTS - {read for path in SOURCES for read in reads_of(path)}


def test_the_scan_finds_a_read():
    source = "def f(layer, saved):\n    return layer.weight + saved.weight, layer.weight.shape\n"
    assert numbers_read(source) == ["layer"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_nothing_is_copied_where_nothing_is_converted(dtype):
    layer = nn.Linear(4, 6).to(dtype)
    assert stored_weight(layer) is layer.weight
    assert frozen_weight(layer) is layer.weight
    assert frozen_weight(layer, dtype) is layer.weight
    assert weight_values(layer.weight, dtype) is layer.weight
    assert frozen_weight(layer, torch.float64).dtype == torch.float64
    assert layer.weight.dtype == dtype


def test_numbers_are_written_in_place_and_rounded_once():
    layer = nn.Linear(4, 6).to(torch.bfloat16)
    weight, values = layer.weight, torch.randn(6, 4)
    write_frozen_weight(layer, values)
    assert layer.weight is weight
    assert weight.equal(values.bfloat16())
