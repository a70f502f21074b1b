"""Gradient checkpointing: blocks drop their activations and compute them again in the backward
pass.

A checkpointed block gets a subclass of its class that differs only in `forward`
(training/block_classes.py), so DDP, FSDP2 and torch.compile see plain modules. diffusers'
enable_gradient_checkpointing has a fixed depth, which in a UNet is inside the top-level blocks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import (
    _CachedTorchDispatchMode,
    _CachingTorchDispatchMode,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from common.errors import ModelError
from training.activation_offload import ActivationCopier
from training.block_classes import outermost, with_forward

Policy = Literal["full", "keep-attention-output"]

ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)
"""Operators of scaled_dot_product_attention, by device, dtype and mask.

Its math fallback consists of plain matrix products, whose backward pass needs the attention matrix.
That is recomputed under either policy."""
KEPT = [getattr(torch.ops.aten, name).default for name in ATTENTION]


class Checkpointed:
    """Marks the classes that `checkpointed` makes."""

    original: ClassVar[type[nn.Module]]
    activation_copier: ActivationCopier | None = None
    """Copies the block's inputs to the host, if they are offloaded."""


@cache
def checkpointed(cls: type[nn.Module], policy: Policy, is_random: bool) -> type[nn.Module]:
    """Return a subclass of `cls` with the same name and a checkpointed forward pass.

    Without gradients the forward pass is the original one. `is_random`: the second pass needs the
    random state of the first."""
    original = cls.forward

    @wraps(original)
    def forward(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return original(self, *args, **kwargs)
        # checkpoint() keeps only tensors, and random states of devices, of positional arguments
        inputs, structure = tree_flatten((args, kwargs))

        def run(*inputs: Any) -> Any:
            args, kwargs = tree_unflatten(inputs, structure)
            return original(self, *args, **kwargs)

        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": is_random}
        if policy == "keep-attention-output":
            # created in the forward pass, as torch.compile requires
            options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
        if self.activation_copier is None:
            return checkpoint(run, *inputs, **options)
        with self.activation_copier.offloading():
            return checkpoint(run, *inputs, **options)

    return with_forward(cls, Checkpointed, forward)


def apply(
    denoiser: nn.Module,
    blocks: dict[str, nn.Module],
    policy: Policy = "full",
    has_dropout: bool = True,
    activation_copier: ActivationCopier | None = None,
) -> None:
    """Checkpoint `blocks` of the denoiser, and no others. `has_dropout`: adapters will have a
    dropout. `activation_copier`: offload the inputs of the blocks.

    Raises ModelError if the denoiser has no blocks."""
    remove(denoiser)
    if "" in blocks:
        raise ModelError(
            f"--gradient_checkpointing: {type(denoiser).__name__} has no blocks, only single "
            "layers. Use --no_gradient_checkpointing"
        )
    is_random = has_dropout or has_active_dropout(denoiser)
    for name, block in blocks.items():
        assert "forward" not in vars(block), f"{name}.forward is patched: no checkpoint possible"
        block.__class__ = checkpointed(type(block), policy, is_random)  # type: ignore[arg-type]
        block.activation_copier = activation_copier  # type: ignore[assignment]


@contextmanager
def hidden_from_policy() -> Iterator[None]:
    """Hide operators in a block from a selective policy, which must see the same ones in both passes."""
    policies = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
    if not isinstance(_get_current_dispatch_mode(), policies):
        yield
        return
    with _pop_mode_temporarily():
        yield


def first_blocks(blocks: dict[str, nn.Module], max_blocks: int | None) -> dict[str, nn.Module]:
    """Return so many blocks, or all. Blocks inside other blocks are skipped.

    The backward pass comes to the first blocks last, when the others have freed their activations."""
    return dict(islice(outermost(blocks).items(), max_blocks))


def has_active_dropout(model: nn.Module) -> bool:
    """Return whether a module of the model drops something in training.

    Attention in transformers has its dropout as a number, and no layer for it."""
    for module in model.modules():
        if "Dropout" in type(module).__name__ and getattr(module, "p", 0) > 0:
            return True
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float) and value > 0:
                return True
    return False


def remove(denoiser: nn.Module) -> None:
    """Undo `apply`, and disable diffusers' checkpointing: nested checkpoints compute twice."""
    if getattr(denoiser, "is_gradient_checkpointing", False):
        denoiser.disable_gradient_checkpointing()  # type: ignore[operator]
    for module in denoiser.modules():
        if isinstance(module, Checkpointed):
            module.__class__ = module.original  # type: ignore[assignment]
