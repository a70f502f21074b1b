"""Blocks whose forward pass is replaced, by a subclass of their class.

FSDP2 marks its modules in the same way. No module is added or patched, so names, state_dict keys,
attributes, hooks and `isinstance` do not change, and equal blocks still have equal classes.
"""

from collections.abc import Callable
from typing import Any

from torch import nn


def with_forward(
    cls: type[nn.Module],
    marker: type,
    forward: Callable[..., Any],
) -> type[nn.Module]:
    """Return a subclass of `cls` with the same name, marked by a base class, and another forward
    pass.

    Its `original` is `cls`."""
    members: dict[str, Any] = {
        "forward": forward,
        "original": cls,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    # the class comes first: the memory layout of objects must not change
    return type(cls.__name__, (cls, marker), members)


def outermost(blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the blocks that are not inside others."""
    inner_modules: set[nn.Module] = set()
    for block in blocks.values():
        _, *modules = block.modules()  # the first one is the block
        inner_modules.update(modules)
    outer_blocks = {}
    for name, block in blocks.items():
        if block not in inner_modules:
            outer_blocks[name] = block
    return outer_blocks
