"""Dropout of ranks and of whole updates, applied to an adapter's tensors."""

import torch
from torch import Tensor

from lora_algos.config import AdapterOptions
from lora_algos.tensors import BIAS, LayerTensors
from lora_algos.traits import TensorTraits


def drop_ranks(
    traits: TensorTraits,
    tensors: LayerTensors,
    options: AdapterOptions,
) -> tuple[LayerTensors, Tensor]:
    """Return tensors with ranks set to zero, or all ranks, and whether the update is kept.

    The second result is a boolean tensor (), so that nothing is read from the device. Masks are
    drawn in the order of `dropout_axes`: the same draws on every process."""
    names = [name for name in traits.dropout_axes if name in tensors]
    device = tensors[names[0]].device
    is_kept = torch.rand((), device=device) >= options.module_dropout
    scale = 1.0
    if not traits.is_multiplicative:
        scale = 1 / (1 - options.rank_dropout)
    masked_tensors = dict(tensors)
    masks: dict[int, Tensor] = {}
    for name in names:
        tensor = tensors[name]
        axis = traits.dropout_axes[name]
        num_ranks = tensor.shape[axis]
        if num_ranks not in masks:
            draws = torch.rand(num_ranks, device=tensor.device)
            masks[num_ranks] = (draws >= options.rank_dropout) & is_kept
        mask = along_axis(masks[num_ranks], axis, tensor.ndim)
        masked_tensors[name] = tensor * (mask.to(tensor.dtype) * scale)
    if BIAS in tensors:
        masked_tensors[BIAS] = tensors[BIAS] * is_kept
    return masked_tensors, is_kept


def along_axis(vector: Tensor, axis: int, num_axes: int) -> Tensor:
    """Return a vector as a tensor with `num_axes` axes.

    All sides but that of `axis` are 1."""
    sides = [1] * num_axes
    sides[axis] = len(vector)
    return vector.view(sides)
