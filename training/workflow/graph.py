"""A graph of ComfyUI's nodes.

nodes.json has the inputs and outputs of the nodes, as ComfyUI names and orders them: those of ComfyUI
0.3.64, FLUX.2's from its own example workflows, and UnetLoaderGGUF of the custom nodes ComfyUI-GGUF.
Types of inputs besides ComfyUI's own: COMBO is a choice, SEED an integer that ComfyUI can change after
each image, UPLOAD a choice of images.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "SEED", "UPLOAD"})
"""Types of inputs whose values are entered in a node; all others are links."""


class NodeDefinition(NamedTuple):
    """The inputs and outputs of a kind of node, in ComfyUI's order."""

    inputs: dict[str, str]
    """Name -> type."""
    outputs: list[str]
    """Types."""

    @property
    def links(self) -> list[str]:
        """Return the names of inputs that come from other nodes."""
        return self._names(is_widget=False)

    @property
    def widgets(self) -> list[str]:
        """Return the names of inputs whose values are entered in the node."""
        return self._names(is_widget=True)

    def _names(self, is_widget: bool) -> list[str]:
        names = []
        for name, input_type in self.inputs.items():
            if (input_type in WIDGET_TYPES) == is_widget:
                names.append(name)
        return names


@cache
def node_definitions() -> dict[str, NodeDefinition]:
    """Return the definitions by ComfyUI's name of the node."""
    path = Path(__file__).with_name("nodes.json")
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    definitions = {}
    for name, definition in content.items():
        definitions[name] = NodeDefinition(**definition)
    return definitions


class Output(NamedTuple):
    """An output of a node: a link to it is the input of another."""

    node: int
    slot: int


Value = str | int | float | bool | Output


@dataclass(frozen=True)
class Node:
    """A node: its kind, and the values and links of its inputs."""

    number: int
    kind: str
    inputs: dict[str, Value]

    @property
    def definition(self) -> NodeDefinition:
        return node_definitions()[self.kind]

    def output(self, slot: int = 0) -> Output:
        return Output(self.number, slot)

    @property
    def sources(self) -> dict[str, Output]:
        """Return the inputs that are links."""
        sources = {}
        for name, value in self.inputs.items():
            if isinstance(value, Output):
                sources[name] = value
        return sources


@dataclass
class Graph:
    """Nodes, each after those that it is linked to."""

    nodes: list[Node] = field(default_factory=list)

    def add(self, kind: str, inputs: dict[str, Value]) -> Node:
        """Add a node; return it. `kind`: ComfyUI's name. Raises ValueError for unknown inputs."""
        definition = node_definitions()[kind]
        unknown_names = inputs.keys() - definition.inputs.keys()
        if unknown_names:
            names = ", ".join(sorted(unknown_names))
            raise ValueError(f"{kind} has no inputs {names}")
        number = len(self.nodes) + 1
        node = Node(number, kind, inputs)
        self.nodes.append(node)
        return node


def api_form(graph: Graph) -> dict[str, Any]:
    """Return a graph as ComfyUI's server takes it."""
    nodes = {}
    for node in graph.nodes:
        key = str(node.number)
        nodes[key] = {
            "class_type": node.kind,
            "inputs": api_inputs(node),
        }
    return nodes


def api_inputs(node: Node) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for name, value in node.inputs.items():
        if isinstance(value, Output):
            inputs[name] = [str(value.node), value.slot]
        else:
            inputs[name] = value
    return inputs
