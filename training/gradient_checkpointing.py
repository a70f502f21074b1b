"""Gradient checkpointing at a chosen depth: blocks drop their activations and compute them again in
the backward pass.

A checkpointed block gets a subclass of its own class that differs in `forward` alone, the way FSDP2
marks its modules. No module is added and none is patched: names, state_dict keys, attributes, hooks
and `isinstance` stay as they were, equal blocks still have equal classes, and DDP, FSDP2 and
torch.compile see plain modules. diffusers' own enable_gradient_checkpointing cannot do this: it
calls back only at the places that each model's authors chose, which in a UNet are inside the
top-level blocks.
"""

from collections.abc import Iterator
from functools import cache, partial, wraps
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from common.errors import ModelError
from lora_algos.adapter import AdapterLayer

Policy = Literal["full", "keep-attention-output"]

# What scaled_dot_product_attention becomes, by device, dtype and mask. Its math fallback is no
# operator of its own but plain matrix products, whose backward needs the attention matrix: that is
# recomputed under either policy.
ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)
KEPT = [getattr(torch.ops.aten, name).default for name in ATTENTION]


class Checkpointed:
    """Marks the classes that `checkpointed` makes."""

    original: ClassVar[type[nn.Module]]


@cache
def checkpointed(cls: type[nn.Module], policy: Policy) -> type[nn.Module]:
    """A subclass of `cls` under the same name whose forward pass is checkpointed where gradients
    are wanted."""
    original = cls.forward
    selective = policy == "keep-attention-output"

    @wraps(original)
    def forward(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return original(self, *args, **kwargs)
        # torch looks for the devices whose random state it keeps, and for tensors to save, in
        # positional arguments only
        flat, structure = tree_flatten((args, kwargs))

        def run(*flat: Any) -> Any:
            args, kwargs = tree_unflatten(flat, structure)
            return original(self, *args, **kwargs)

        if not selective:
            return checkpoint(run, *flat, use_reentrant=False, preserve_rng_state=True)
        contexts = partial(
            create_selective_checkpoint_contexts, KEPT
        )  # torch.compile wants it made here
        return checkpoint(
            run, *flat, use_reentrant=False, preserve_rng_state=True, context_fn=contexts
        )

    members = {
        "forward": forward,
        "original": cls,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (Checkpointed, cls), members)


def apply(denoiser: nn.Module, depth: int, policy: Policy = "full") -> list[str]:
    """Checkpoints the blocks of `denoiser` at `depth`, instead of any checkpointed before; returns
    their names.

    Depth 1 is the model's top-level blocks, 2 their children, and so on; a branch that ends earlier is checkpointed at
    its deepest block. Raises ModelError for a model without blocks.
    """
    remove(denoiser)
    blocks = blocks_at(denoiser, depth)
    if "" in blocks:
        raise ModelError(
            f"{type(denoiser).__name__} has no blocks to checkpoint, only single layers. "
            "Give --no_gradient_checkpointing"
        )
    inner = {
        id(m) for block in blocks.values() for m in block.modules() if m is not block
    }  # of shared modules
    blocks = {name: block for name, block in blocks.items() if id(block) not in inner}
    for name, block in blocks.items():
        assert "forward" not in vars(block), (
            f"{name}.forward is patched, which would bypass the checkpoint"
        )
        block.__class__ = checkpointed(type(block), policy)  # type: ignore[arg-type]
    return list(blocks)


def remove(denoiser: nn.Module) -> None:
    """Undoes `apply`, and diffusers' own checkpointing: one inside another would compute everything
    twice."""
    if getattr(denoiser, "is_gradient_checkpointing", False):
        denoiser.disable_gradient_checkpointing()  # type: ignore[operator]
    for module in denoiser.modules():
        if isinstance(module, Checkpointed):
            module.__class__ = module.original  # type: ignore[assignment]


def blocks_at(module: nn.Module, depth: int, name: str = "") -> dict[str, nn.Module]:
    """The blocks `depth` levels below `module` by name, or the deepest ones of branches that end
    before."""
    inner = {n: m for n, m in children_of(module, name) if is_block(m)} if depth else {}
    if not inner:
        return {name: module}
    return {
        n: m
        for child, block in inner.items()
        for n, m in blocks_at(block, depth - 1, child).items()
    }


def children_of(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules one level below; lists and sequences of modules are no level, but what they hold
    is."""
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if isinstance(child, nn.Sequential) or type(child).forward is nn.Module.forward:
            yield from children_of(child, path)
        else:
            yield path, child


def is_block(module: nn.Module) -> bool:
    """Whether a checkpoint around `module` can save anything: it holds several layers, adapted or
    not."""
    return num_layers(module) > 1


def num_layers(module: nn.Module) -> int:
    """How many modules with parameters of their own there are; an adapted layer is one."""
    if isinstance(module, AdapterLayer):
        return 1
    own = any(True for _ in module.parameters(recurse=False))
    return own + sum(num_layers(child) for child in module.children())
