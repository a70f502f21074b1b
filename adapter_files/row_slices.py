"""Adapters of some rows of a weight, cut from the adapter of all its rows.

WHEN: the original model has several layers as one weight, such as to_q, to_k and to_v. The result
is exact. If the rows have no adapter of the same algorithm, it is their whole update, `diff`. A
rotation whose blocks reach over the border of two layers has neither, and is an error.
"""

import torch
from torch import Tensor

from adapter_files.convert import full_tensors
from common.errors import AdapterError
from lora_algos.detection import detect_algorithm, find_algorithm
from lora_algos.tensors import ALPHA, BIAS, COMMON_NAMES, LayerTensors
from lora_algos.traits import RowAxes, RowAxis
from models.layer_names.names import RowSlice


def row_axes(tensors: LayerTensors, num_rows: int) -> RowAxes | None:
    """Return the axes of the tensors that hold the rows of a weight with `num_rows` rows.

    None: no tensor of the algorithm holds rows. Raises AdapterError if a tensor does not fit."""
    axes: RowAxes = {}
    algorithm = find_algorithm(tensors)
    if algorithm is not None:
        if algorithm.traits.row_axes is None:
            return None
        axes |= algorithm.traits.row_axes(tensors, num_rows)
    if BIAS in tensors:
        axes[BIAS] = RowAxis()
    for name, row_axis in axes.items():
        shape = tuple(tensors[name].shape)
        if shape[row_axis.axis] * row_axis.unit != num_rows:
            raise AdapterError(
                f"{name} is {shape}, and the original model's weight has {num_rows} rows"
            )
    return axes


def portable(tensors: LayerTensors) -> LayerTensors:
    """Return tensors of the same function that all programs read alike and that can be cut."""
    algorithm = find_algorithm(tensors)
    return tensors if algorithm is None else algorithm.traits.files.portable(tensors)


def take_rows(
    tensors: LayerTensors,
    num_rows: int,
    ranges: list[RowSlice],
) -> LayerTensors | None:
    """Return the adapter of these rows, in this order; None if it cannot be cut there."""
    tensors = portable(tensors)
    axes = row_axes(tensors, num_rows)
    if axes is None:
        return None
    if not all(can_cut(row_axis, ranges) for row_axis in axes.values()):
        return take_rows_of_unit(tensors, axes, ranges[0]) if len(ranges) == 1 else None
    taken_tensors = dict(tensors)
    for name, row_axis in axes.items():
        axis, unit = row_axis.axis, row_axis.unit
        pieces = []
        for first, count in ranges:
            piece = tensors[name].narrow(axis, first // unit, count // unit)
            pieces.append(piece)
        taken_tensors[name] = torch.cat(pieces, axis)
    return taken_tensors


def can_cut(row_axis: RowAxis, ranges: list[RowSlice]) -> bool:
    """Return whether a tensor can be cut at both ends of all ranges."""
    step = row_axis.step
    return all(first % step == 0 and count % step == 0 for first, count in ranges)


def take_rows_of_unit(
    tensors: LayerTensors,
    axes: RowAxes,
    rows: RowSlice,
) -> LayerTensors | None:
    """Return the adapter of rows inside one unit of a tensor; None if it cannot be cut there."""
    first, count = rows
    taken_tensors = dict(tensors)
    for name, row_axis in axes.items():
        axis, unit = row_axis.axis, row_axis.unit
        if unit == 1:
            taken_tensors[name] = tensors[name].narrow(axis, first, count)
            continue
        index, start = divmod(first, unit)
        inner_name = row_axis.inner_tensor
        if not inner_name or start + count > unit:
            return None
        inner_tensor = tensors[inner_name]
        taken_tensors[name] = tensors[name].narrow(axis, index, 1)
        taken_tensors[inner_name] = inner_tensor.narrow(0, start, count)
    return taken_tensors


def adapter_of_rows(tensors: LayerTensors, shape: torch.Size, rows: RowSlice) -> LayerTensors:
    """Return the adapter of some rows, given that of a fused weight of `shape`.

    Empty if it changes other rows and not these. Raises AdapterError if the rows' update depends on
    the weights of other layers."""
    first, count = rows
    taken_tensors = take_rows(tensors, shape[0], [rows])
    if taken_tensors is None:
        whole_update = full_tensors(tensors, weight_without_values(tensors, shape, rows))
        return {
            name: tensor.narrow(0, first, count).contiguous()
            for name, tensor in whole_update.items()
        }
    if changes_only_others(tensors, taken_tensors, shape[0]):
        return {}
    return without_idle_ranks(taken_tensors, count)


def weight_without_values(tensors: LayerTensors, shape: torch.Size, rows: RowSlice) -> Tensor:
    """Return a weight for an update that does not depend on its values.

    Raises AdapterError for other updates."""
    algorithm = detect_algorithm(tensors)
    if algorithm.traits.needs_base_weight:
        first, count = rows
        axes = row_axes(portable(tensors), shape[0]) or {}
        step = max((row_axis.step for row_axis in axes.values()), default=shape[0])
        raise AdapterError(
            f"{algorithm.name} of the original model's weight of {shape[0]} rows: its blocks of "
            f"{step} rows mix rows of this layer ({first} to {first + count - 1}) with rows of "
            "other layers"
        )
    return torch.empty(shape, device="meta")


def changes_only_others(
    tensors: LayerTensors,
    taken_tensors: LayerTensors,
    num_rows: int,
) -> bool:
    """Return whether an adapter changes rows, and none of those that were taken."""
    names = row_axes(tensors, num_rows) or {}
    changes_taken_rows = any(taken_tensors[name].any() for name in names)
    if changes_taken_rows:
        return False
    return any(tensors[name].any() for name in names)


def sums_over_ranks(tensors: LayerTensors, num_rows: int) -> bool:
    """Return whether an update is a sum over ranks, of factors that can be stacked.

    All other tensors must hold rows, so that they can be stacked too."""
    pairs = detect_algorithm(tensors).traits.factor_pairs
    if not pairs:
        return False
    axes = row_axes(tensors, num_rows) or {}
    stackable_names = {*axes, *COMMON_NAMES}
    for pair in pairs:
        stackable_names |= {*pair}
    return tensors.keys() <= stackable_names


def without_idle_ranks(tensors: LayerTensors, num_rows: int) -> LayerTensors:
    """Return an adapter without the ranks that are zero in its rows.

    So a layer whose ranks were stacked with those of others gets its own rank back."""
    algorithm = find_algorithm(tensors)
    if algorithm is None or not sums_over_ranks(tensors, num_rows):
        return tensors
    pairs = algorithm.traits.factor_pairs
    rank, alpha = algorithm.traits.rank_and_alpha(tensors)
    used_in_factors = [tensors[up].reshape(-1, rank).any(0) for up, _ in pairs]
    is_used = torch.stack(used_in_factors).any(0)
    if is_used.all() or not is_used.any():
        return tensors
    used_tensors = dict(tensors)
    used_rank = int(is_used.sum())
    used_tensors[ALPHA] = torch.tensor(alpha * used_rank / rank)
    for up, down in pairs:
        used_tensors[up] = tensors[up][:, is_used]
        used_tensors[down] = tensors[down][is_used]
    return used_tensors
