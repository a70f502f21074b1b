"""The blocks of a denoiser: the modules that are checkpointed, sharded or moved one at a time.

A block is a module with several layers. An adapted layer counts as one layer; it is a module with a
`base_layer`.
"""

from collections.abc import Iterator, Mapping

from torch import nn


def find_blocks(module: nn.Module, depth: int = 1, name: str = "") -> dict[str, nn.Module]:
    """Return the blocks `depth` levels below `module`, by name.

    Depth 1 is the top-level blocks, depth 2 the blocks inside these, and so on. If a branch ends
    earlier, its deepest block is returned. A module without blocks is its own block."""
    if depth == 0:
        return {name: module}
    blocks: dict[str, nn.Module] = {}
    for child_name, child in children_of(module, name):
        if is_block(child):
            blocks |= find_blocks(child, depth - 1, child_name)
    return blocks or {name: module}


def children_of(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules one level below, by name.

    Lists and sequences of modules are not a level; the modules in them are."""
    for key, child in module.named_children():
        child_name = f"{name}.{key}" if name else key
        has_no_forward = type(child).forward is nn.Module.forward
        if isinstance(child, nn.Sequential) or has_no_forward:
            yield from children_of(child, child_name)
        else:
            yield child_name, child


def is_block(module: nn.Module) -> bool:
    """Return whether a module has several layers, adapted or not."""
    return num_layers(module) > 1


def num_layers(module: nn.Module) -> int:
    """Count the modules that have parameters themselves; an adapted layer is one."""
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        return 1
    has_parameters = any(True for _ in module.parameters(recurse=False))
    count = 1 if has_parameters else 0
    for child in module.children():
        count += num_layers(child)
    return count


def inner_blocks(blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the blocks between a denoiser's input and output layers, which hold most weights.

    These are the blocks of lists of alike blocks, and the middle of a UNet."""
    return {name: block for name, block in blocks.items() if is_inner_block(name)}


def is_inner_block(name: str) -> bool:
    """Return whether a denoiser's block is one of a list of alike blocks, or the middle of a UNet."""
    parents = name.split(".")
    if parents[0].startswith("text_encoder"):
        return False
    return any(parent.isdigit() or parent == "mid_block" for parent in parents)
