"""Adapters of weights that have another shape in the original model: fused of several layers, or
with the halves of their rows swapped.

The result is exact. If it has no form in the same algorithm, it is the whole update, `diff`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from adapter_files.normalize import bias_of
from adapter_files.row_slices import portable, row_axes, sums_over_ranks, take_rows
from common.errors import AdapterError
from lora_algos.detection import detect_algorithm, layer_delta
from lora_algos.full import DIFF
from lora_algos.tensors import ALPHA, BIAS, COMMON_NAMES, LayerTensors, to_device
from lora_algos.traits import RowAxes, RowAxis, TensorTraits
from models.layer_names.names import RowSlice, swap_halves

Slices = Mapping[RowSlice, LayerTensors]
"""Rows of a fused weight -> the adapter of these rows."""


def fuse(
    slices: Slices,
    weights: Mapping[RowSlice, Tensor],
    num_rows: int,
) -> LayerTensors:
    """Return one adapter of a fused weight with `num_rows` rows.

    `weights`: the weights of the same rows. Rows without an adapter stay unchanged."""
    slices = {rows: portable(tensors) for rows, tensors in slices.items()}
    fused_tensors = fuse_in_algorithm(slices, num_rows)
    if fused_tensors is None:
        deltas = {}
        for rows, tensors in slices.items():
            deltas[rows] = update_of(tensors, weights[rows])
        fused_tensors = {DIFF: place(deltas, RowAxis(), num_rows)}
    return {**fused_tensors, **fuse_biases(slices, num_rows)}


def fuse_biases(slices: Slices, num_rows: int) -> LayerTensors:
    """Return the changes of all biases as one, if any layer has one."""
    biases = {rows: tensors[BIAS] for rows, tensors in slices.items() if BIAS in tensors}
    return {BIAS: place(biases, RowAxis(), num_rows)} if biases else {}


def fuse_in_algorithm(slices: Slices, num_rows: int) -> LayerTensors | None:
    """Return the adapter, without biases, in the algorithm of the slices.

    None: the slices have several algorithms, or theirs has no adapter of the whole weight."""
    algorithms = {detect_algorithm(tensors) for tensors in slices.values()}
    if len(algorithms) > 1:
        return None
    traits = algorithms.pop().traits
    if traits.row_axes is None:
        return None
    num_adapted_rows = sum(count for _, count in slices)
    if num_adapted_rows < num_rows and not traits.zero_rows_change_nothing:
        return None
    if all(sums_over_ranks(tensors, rows[1]) for rows, tensors in slices.items()):
        return stack_ranks(slices, traits, num_rows)
    return place_all(slices, num_rows)


def stack_ranks(
    slices: Slices,
    traits: TensorTraits,
    num_rows: int,
) -> LayerTensors:
    """Return sums over ranks as one, in which each slice has its own ranks."""
    total_rank = sum(traits.rank(tensors) or 1 for tensors in slices.values())
    alphas = [traits.rank_and_alpha(tensors)[1] for tensors in slices.values()]
    alpha = next(filter(None, alphas), 1.0)
    fused_tensors = {ALPHA: torch.tensor(alpha)}
    scales = {}
    for rows, tensors in slices.items():
        rank, own_alpha = traits.rank_and_alpha(tensors)
        scales[rows] = own_alpha / rank * total_rank / alpha
    for up, down in traits.factor_pairs:
        fused_tensors[up] = stack_up(slices, up, scales, num_rows)
        fused_tensors[down] = torch.cat([tensors[down] for tensors in slices.values()])
        scales = dict.fromkeys(slices, 1.0)  # the first factor has the scaling of each slice
    for name in common_row_axes(slices):
        if name not in fused_tensors:
            fused_tensors[name] = place_tensor(slices, name, RowAxis(), num_rows)
    return fused_tensors


def stack_up(
    slices: Slices,
    name: str,
    scales: Mapping[RowSlice, float],
    num_rows: int,
) -> Tensor:
    """Return the first factors (rows, rank, ...) of all slices, scaled, as a block diagonal."""
    factors = {rows: tensors[name] * scales[rows] for rows, tensors in slices.items()}
    first_factor = next(iter(factors.values()))
    total_rank = sum(factor.shape[1] for factor in factors.values())
    fused_up = first_factor.new_zeros((num_rows, total_rank, *first_factor.shape[2:]))
    first_rank = 0
    for (start, count), factor in factors.items():
        end_rank = first_rank + factor.shape[1]
        fused_up[start : start + count, first_rank:end_rank] = factor
        first_rank = end_rank
    return fused_up


def place_all(slices: Slices, num_rows: int) -> LayerTensors | None:
    """Return adapters whose tensors all hold rows as one; None if they do not fit together."""
    axes = common_row_axes(slices)
    first_tensors = next(iter(slices.values()))
    fused_tensors = {}
    for name in first_tensors:
        if name in COMMON_NAMES:
            continue
        if name not in axes or not fits_together(slices, name, axes[name], num_rows):
            return None
        fused_tensors[name] = place_tensor(slices, name, axes[name], num_rows)
    alphas = {float(tensors[ALPHA]) for tensors in slices.values() if ALPHA in tensors}
    if len(alphas) > 1:
        return None
    for alpha in alphas:
        fused_tensors[ALPHA] = torch.tensor(alpha)
    return fused_tensors


def common_row_axes(slices: Slices) -> RowAxes:
    """Return the row axes of the first slice, without that of the bias."""
    rows, tensors = next(iter(slices.items()))
    axes = row_axes(tensors, rows[1]) or {}
    return {name: row_axis for name, row_axis in axes.items() if name != BIAS}


def fits_together(
    slices: Slices,
    name: str,
    row_axis: RowAxis,
    num_rows: int,
) -> bool:
    """Return whether a tensor of all slices can be one tensor of the fused weight."""
    other_sides = set()
    for rows, tensors in slices.items():
        axes = row_axes(tensors, rows[1]) or {}
        if axes.get(name) != row_axis or rows[0] % row_axis.step:
            return False
        sides = list(tensors[name].shape)
        del sides[row_axis.axis]
        other_sides.add(tuple(sides))
    return len(other_sides) == 1 and num_rows % row_axis.step == 0


def place_tensor(
    slices: Slices,
    name: str,
    row_axis: RowAxis,
    num_rows: int,
) -> Tensor:
    """Return one tensor of all slices as a tensor of the fused weight."""
    values = {rows: tensors[name] for rows, tensors in slices.items()}
    return place(values, row_axis, num_rows)


def place(
    values: Mapping[RowSlice, Tensor],
    row_axis: RowAxis,
    num_rows: int,
) -> Tensor:
    """Return the rows at their places among `num_rows`, with zeros at all other places."""
    axis, unit = row_axis.axis, row_axis.unit
    first_value = next(iter(values.values()))
    shape = list(first_value.shape)
    shape[axis] = num_rows // unit
    placed = first_value.new_zeros(shape)
    for (start, count), value in values.items():
        target = placed.narrow(axis, start // unit, count // unit)
        target.copy_(value)
    return placed


def swap_adapter(tensors: LayerTensors, weight: Tensor) -> LayerTensors:
    """Return the adapter of a weight whose halves of rows are swapped, given that of `weight`.

    Raises AdapterError if it depends on values that `weight` does not have."""
    num_rows = weight.shape[0]
    half = num_rows // 2
    swapped_tensors = take_rows(tensors, num_rows, [RowSlice(half, half), RowSlice(0, half)])
    if swapped_tensors is not None:
        return swapped_tensors
    swapped_tensors = {DIFF: swap_halves(update_of(tensors, weight))}
    for name, tensor in bias_of(tensors).items():
        swapped_tensors[name] = swap_halves(tensor)
    return swapped_tensors


def update_of(tensors: LayerTensors, weight: Tensor) -> Tensor:
    """Return the update of `weight`, on the device of the tensors.

    Tensors without values have an update without values. Raises AdapterError if the update depends
    on values that `weight` does not have."""
    first_tensor = next(tensor for name, tensor in tensors.items() if name != ALPHA)
    device = first_tensor.device
    if first_tensor.is_meta:
        return torch.empty(weight.shape, device=device, dtype=first_tensor.dtype)
    if not weight.is_meta:
        tensors = to_device(tensors, weight.device)
    elif detect_algorithm(tensors).traits.needs_base_weight:
        algorithm = detect_algorithm(tensors).name
        raise AdapterError(f"{algorithm} needs the values of the base weight here")
    return layer_delta(tensors, weight).to(device)
