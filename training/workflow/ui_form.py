"""A graph of ComfyUI's nodes as its editor stores it: with positions, and with widgets in order."""

from typing import Any

from training.workflow.graph import Graph, Node, Output

VERSION = 0.4
"""Version of the editor's format."""
COLUMN, NODE_WIDTH, ROW_GAP = 380, 320, 50
TITLE_HEIGHT, SLOT_HEIGHT, WIDGET_HEIGHT, TEXT_HEIGHT = 30, 22, 26, 120
"""Pixels."""
NOTE_SIZE = (460, 420)
NOTE_KIND = "MarkdownNote"
FILE_ENDINGS = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth")
"""Endings of files with weights."""


def ui_form(graph: Graph, note: str, files: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Return a graph as ComfyUI's editor opens it.

    `note`: Markdown, shown at the left of the nodes. `files`: name of a model's file -> `name`,
    `directory` and `url`, from which ComfyUI offers to download files that are missing."""
    links = all_links(graph)
    entries = [note_entry(len(graph.nodes) + 1, note)]
    for node, position in zip(graph.nodes, positions(graph), strict=True):
        entries.append(node_entry(node, position, links, files))
    return {
        "last_node_id": len(entries),
        "last_link_id": len(links),
        "nodes": entries,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": VERSION,
    }


def all_links(graph: Graph) -> list[list[Any]]:
    """Return [number, node, output, node, input, type] of each link."""
    links: list[list[Any]] = []
    for node in graph.nodes:
        slots = slot_names(node)
        for name, source in node.sources.items():
            source_node = graph.nodes[source.node - 1]
            output_type = source_node.definition.outputs[source.slot]
            number = len(links) + 1
            slot = slots.index(name)
            links.append([number, *source, node.number, slot, output_type])
    return links


def node_entry(
    node: Node, position: tuple[int, int], links: list[list[Any]], files: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """Return a node as the editor stores it."""
    properties: dict[str, Any] = {"Node name for S&R": node.kind}
    node_files = [files[name] for name in file_names(node) if name in files]
    if node_files:
        properties["models"] = node_files
    return {
        "id": node.number,
        "type": node.kind,
        "pos": list(position),
        "size": [NODE_WIDTH, node_height(node)],
        "flags": {},
        "order": node.number,
        "mode": 0,
        "inputs": input_slots(node, links),
        "outputs": output_slots(node, links),
        "properties": properties,
        "widgets_values": widget_values(node),
    }


def input_slots(node: Node, links: list[list[Any]]) -> list[dict[str, Any]]:
    """Return the inputs of a node that may be links, each with the number of its link."""
    numbers = {}
    for number, _, _, target, slot, _ in links:
        if target == node.number:
            numbers[slot] = number
    slots = []
    for slot, name in enumerate(slot_names(node)):
        entry: dict[str, Any] = {
            "name": name,
            "type": node.definition.inputs[name],
            "link": numbers.get(slot),
        }
        if name in node.definition.widgets:
            entry["widget"] = {"name": name}
        slots.append(entry)
    return slots


def slot_names(node: Node) -> list[str]:
    """Return the names of inputs that may be links, and of widgets that have one."""
    linked_widgets = [name for name in node.definition.widgets if name in node.sources]
    return [*node.definition.links, *linked_widgets]


def output_slots(node: Node, links: list[list[Any]]) -> list[dict[str, Any]]:
    """Return the outputs of a node, each with the numbers of its links."""
    slots = []
    for slot, output_type in enumerate(node.definition.outputs):
        numbers = []
        for number, source, source_slot, *_ in links:
            if (source, source_slot) == (node.number, slot):
                numbers.append(number)
        entry = {
            "name": output_type,
            "type": output_type,
            "slot_index": slot,
            "links": numbers,
        }
        slots.append(entry)
    return slots


def widget_values(node: Node) -> list[Any]:
    """Return the values of a node's widgets in their order, with those that the editor adds."""
    values: list[Any] = []
    for name in node.definition.widgets:
        value = node.inputs[name]
        kind = node.definition.inputs[name]
        if isinstance(value, Output):
            value = ""  # the widget has a link
        values.append(value)
        if kind == "SEED":
            values.append("fixed")  # what the editor does with the seed after an image
        if kind == "UPLOAD":
            values.append("image")
    return values


def note_entry(number: int, text: str) -> dict[str, Any]:
    """Return a note, at the left of all nodes."""
    return {
        "id": number,
        "type": NOTE_KIND,
        "pos": [-NOTE_SIZE[0] - ROW_GAP, 0],
        "size": list(NOTE_SIZE),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [text],
    }


def node_height(node: Node) -> int:
    """Return the height of a node in pixels."""
    definition = node.definition
    num_slots = max(len(definition.links), len(definition.outputs))
    num_widgets = len(widget_values(node))
    height = TITLE_HEIGHT + SLOT_HEIGHT * num_slots + WIDGET_HEIGHT * num_widgets
    if "text" in definition.inputs:
        height += TEXT_HEIGHT
    return height


def positions(graph: Graph) -> list[tuple[int, int]]:
    """Return the corner of each node: nodes are at the right of those that they are linked to."""
    columns: dict[int, int] = {}
    bottoms: dict[int, int] = {}
    corners = []
    for node in graph.nodes:
        before = [columns[source.node] for source in node.sources.values()]
        column = 1 + max(before, default=-1)
        columns[node.number] = column
        top = bottoms.get(column, 0)
        corners.append((column * COLUMN, top))
        bottoms[column] = top + node_height(node) + ROW_GAP
    return corners


def file_names(node: Node) -> list[str]:
    """Return the names of the files that a node loads."""
    names = []
    for value in node.inputs.values():
        if isinstance(value, str) and value.endswith(FILE_ENDINGS):
            names.append(value)
    return names
