"""Adapters of weights that the original model has in another shape: fused of several layers, such
as to_q, to_k and to_v, or with the halves of their rows swapped. Cutting an adapter along its rows,
and putting adapters together.

Exact always: what has no form of its own algorithm is the whole update, `diff`. A rotation whose
blocks reach over the border of two layers is none of either, and refused.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_files.convert import bias_of, delta_of
from common.errors import AdapterError
from lora_algos.attach import algorithm_of
from lora_algos.rotation import constrained
from lora_algos.tensors import constraint_of, known_rank, moved, rank_and_alpha

LayerTensors = dict[str, Tensor]
Range = tuple[int, int]
"""First row, and how many."""
ROWWISE = ("lora_up.weight", "b1.weight", "diff", "diff_b", "lora_magnitude_vector", "dora_scale")
RANK_PAIRS = {
    "LoRA": (("lora_up.weight", "lora_down.weight"),),
    "DoRA": (("lora_up.weight", "lora_down.weight"),),
    "LoHa": (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
}


@dataclass(frozen=True)
class RowAxis:
    """Where a tensor holds the rows of the weight: `unit` of them per entry of `axis`, to be cut at multiples of
    `step`."""

    axis: int
    unit: int = 1
    step: int = 1


def row_axes(tensors: LayerTensors, total: int) -> dict[str, RowAxis]:
    """Of the tensors of a weight with `total` rows, those that differ from row to row. AdapterError if one does not fit
    it."""
    axes = {name: RowAxis(0) for name in ROWWISE if name in tensors}
    axes |= {
        f"hada_w{i}_a": RowAxis(int(f"hada_t{i}" in tensors))
        for i in (1, 2)
        if f"hada_w{i}_a" in tensors
    }
    for name in tensors.keys() & {"lokr_w1", "lokr_w1_a"}:
        unit = total // tensors[name].shape[0]
        axes[name] = RowAxis(0, unit, unit)
    if "oft_blocks" in tensors:
        *stages, _, side, _ = tensors["oft_blocks"].shape
        # the last stage of a butterfly mixes all rows within 2^(stages - 1) blocks
        axes["oft_blocks"] = RowAxis(
            len(stages), side, side * 2 ** (stages[0] - 1) if stages else side
        )
    for name, at in axes.items():
        shape = tuple(tensors[name].shape)
        if shape[at.axis] * at.unit != total:
            raise AdapterError(
                f"{name} is {shape}, and the original model's weight has {total} rows"
            )
    return axes


def chosen(tensors: LayerTensors, total: int, ranges: list[Range]) -> LayerTensors | None:
    """The adapter of these rows of a weight in this order; None if it cannot be cut there."""
    tensors = unconstrained(tensors)
    axes = row_axes(tensors, total)
    if any(
        bound % at.step
        for at in axes.values()
        for first, count in ranges
        for bound in (first, count)
    ):
        return within_one_row(tensors, total, ranges[0]) if len(ranges) == 1 else None
    result = dict(tensors)
    for name, at in axes.items():
        parts = [
            tensors[name].narrow(at.axis, first // at.unit, count // at.unit)
            for first, count in ranges
        ]
        result[name] = torch.cat(parts, at.axis)
    return result


def within_one_row(tensors: LayerTensors, total: int, part: Range) -> LayerTensors | None:
    """The part of a LoKr that one row of w1 makes with some rows of w2; None if it is no such part."""
    w1 = next((name for name in ("lokr_w1", "lokr_w1_a") if name in tensors), None)
    if w1 is None:
        return None
    (first, count), rows = part, total // tensors[w1].shape[0]
    at, start = divmod(first, rows)
    if start + count > rows:
        return None
    w2 = "lokr_w2" if "lokr_w2" in tensors else "lokr_w2_a"
    bias = {"diff_b": tensors["diff_b"].narrow(0, first, count)} if "diff_b" in tensors else {}
    return {
        **tensors,
        w1: tensors[w1].narrow(0, at, 1),
        w2: tensors[w2].narrow(0, start, count),
        **bias,
    }


def unconstrained(tensors: LayerTensors) -> LayerTensors:
    """A rotation with its constraint, which is one for all its blocks, worked in: programs differ in what they take a
    file's alpha for, but not for 0."""
    if "oft_blocks" not in tensors:
        return tensors
    blocks = constrained(tensors["oft_blocks"], constraint_of(tensors))
    return {**tensors, "oft_blocks": blocks, "alpha": torch.tensor(0.0)}


def part_of(tensors: LayerTensors, shape: torch.Size, part: Range) -> LayerTensors:
    """The adapter of some rows, given that of a fused weight of `shape`: nothing if it changes others of its rows and
    not these. AdapterError if it cannot be had without the weight of others."""
    total, (first, count) = shape[0], part
    found = chosen(tensors, total, [part])
    if found is None:
        algorithm = algorithm_of(tensors)
        if algorithm != "LoKr":
            side = tensors["oft_blocks"].shape[-1]
            raise AdapterError(
                f"a {algorithm} of the original model's weight of {total} rows with blocks of {side}, which rotate "
                f"rows of this layer ({first} to {first + count - 1}) and of others into each other"
            )
        whole = {"diff": delta_of(tensors, torch.empty(shape, device="meta")), **bias_of(tensors)}
        return {name: tensor.narrow(0, first, count).contiguous() for name, tensor in whole.items()}
    return {} if is_absent(tensors, found, total) else without_idle_ranks(found)


def is_absent(whole: LayerTensors, part: LayerTensors, total: int) -> bool:
    """Whether an adapter says nothing of these rows, and something of others."""
    names = row_axes(whole, total)
    return not any(part[name].any() for name in names) and any(whole[name].any() for name in names)


def without_idle_ranks(tensors: LayerTensors) -> LayerTensors:
    """Without the ranks that are zero in these rows: what was put side by side comes back at the
    rank it had."""
    pairs = [pair for pair in RANK_PAIRS["LoRA"] + RANK_PAIRS["LoHa"] if pair[0] in tensors]
    if not pairs or "hada_t1" in tensors:
        return tensors
    rank, alpha = rank_and_alpha(tensors)
    used = torch.stack([tensors[up].reshape(-1, rank).any(0) for up, _ in pairs]).any(0)
    if used.all() or not used.any():
        return tensors
    result = {**tensors, "alpha": torch.tensor(alpha * int(used.sum()) / rank)}
    for up, down in pairs:
        result |= {up: tensors[up][:, used], down: tensors[down][used]}
    return result


def halves(total: int) -> list[Range]:
    """The rows of a weight with its halves swapped."""
    return [(total // 2, total // 2), (0, total // 2)]


def swap(tensor: Tensor) -> Tensor:
    return tensor.roll(tensor.shape[0] // 2, 0)


def swapped(tensors: LayerTensors, weight: Tensor) -> LayerTensors:
    """The adapter of a weight whose halves of rows are swapped, given that of `weight`. AdapterError if it takes
    values that `weight` does not have."""
    found = chosen(tensors, weight.shape[0], halves(weight.shape[0]))
    if found is not None:
        return found
    return {
        "diff": swap(delta_on(tensors, weight)),
        **{name: swap(tensor) for name, tensor in bias_of(tensors).items()},
    }


def delta_on(tensors: LayerTensors, weight: Tensor) -> Tensor:
    """The update of `weight`, on the device of `tensors`; of tensors without values one without."""
    there = next(tensor for name, tensor in tensors.items() if name != "alpha")
    if there.is_meta:
        return torch.empty(weight.shape, device="meta", dtype=there.dtype)
    if weight.is_meta and algorithm_of(tensors) != "LoKr":
        raise AdapterError(f"{algorithm_of(tensors)} needs the values of the base's weight here")
    return delta_of(tensors if weight.is_meta else moved(tensors, weight.device), weight).to(
        there.device
    )


def fused(
    parts: dict[Range, LayerTensors], weights: dict[Range, Tensor], total: int
) -> LayerTensors:
    """One adapter of a fused weight of `total` rows, given those of its parts and these' weights. Rows of which there
    is no part stay as they are."""
    parts = {rows: unconstrained(tensors) for rows, tensors in parts.items()}
    algorithms = {algorithm_of(tensors) for tensors in parts.values()}
    algorithm = algorithms.pop() if len(algorithms) == 1 else "Full"
    whole = sum(count for _, count in parts) == total
    if algorithm in RANK_PAIRS and (algorithm != "DoRA" or whole) and not has_core(parts.values()):
        found = side_by_side(parts, RANK_PAIRS[algorithm], total)
        if algorithm == "DoRA":
            found["lora_magnitude_vector"] = placed(
                {rows: tensors["lora_magnitude_vector"] for rows, tensors in parts.items()}, total
            )
    elif algorithm in ("OFT", "BOFT") and same_blocks(parts, total):
        found = {**blocks_in_a_row(parts, total), "alpha": torch.tensor(0.0)}
    else:
        found = {
            "diff": placed({rows: delta_on(t, weights[rows]) for rows, t in parts.items()}, total)
        }
    return {**found, **fused_bias(parts, total)}


def has_core(parts: Iterable[LayerTensors]) -> bool:
    return any("hada_t1" in tensors for tensors in parts)


def fused_bias(parts: dict[Range, LayerTensors], total: int) -> LayerTensors:
    biases = {rows: tensors["diff_b"] for rows, tensors in parts.items() if "diff_b" in tensors}
    return {"diff_b": placed(biases, total)} if biases else {}


def placed(parts: dict[Range, Tensor], total: int) -> Tensor:
    """Rows at their places among `total`, with zeros where there are none."""
    first = next(iter(parts.values()))
    whole = first.new_zeros((total, *first.shape[1:]))
    for (start, count), tensor in parts.items():
        whole[start : start + count] = tensor
    return whole


def side_by_side(
    parts: dict[Range, LayerTensors], pairs: tuple[tuple[str, str], ...], total: int
) -> LayerTensors:
    """Products of thin factors as one, with ranks of their own for the rows of each part."""
    ranks = [known_rank(tensors) or 1 for tensors in parts.values()]
    rank = sum(ranks)
    alpha = next(
        (alpha for alpha in (rank_and_alpha(tensors)[1] for tensors in parts.values()) if alpha),
        1.0,
    )
    found = {"alpha": torch.tensor(alpha)}
    for number, (up, down) in enumerate(pairs):
        first = next(iter(parts.values()))[up]
        whole, at = first.new_zeros((total, rank, *first.shape[2:])), 0
        for ((start, count), tensors), own in zip(parts.items(), ranks, strict=True):
            # each part's own scaling goes into its first factor
            scale = 1.0 if number else rank_and_alpha(tensors)[1] / own * rank / alpha
            whole[start : start + count, at : at + own] = tensors[up] * scale
            at += own
        found |= {up: whole, down: torch.cat([tensors[down] for tensors in parts.values()])}
    return found


def same_blocks(parts: dict[Range, LayerTensors], total: int) -> bool:
    """Whether rotations of these parts are one rotation of the whole."""
    axes = {
        row_axes({"oft_blocks": tensors["oft_blocks"]}, rows[1])["oft_blocks"]
        for rows, tensors in parts.items()
    }
    step = axes.pop().step
    return not axes and not any(start % step for start, _ in parts) and total % step == 0


def blocks_in_a_row(parts: dict[Range, LayerTensors], total: int) -> LayerTensors:
    first = next(iter(parts.values()))["oft_blocks"]
    *stages, _, side, _ = first.shape
    whole = first.new_zeros((*stages, total // side, side, side))
    for (start, count), tensors in parts.items():
        whole.narrow(len(stages), start // side, count // side).copy_(tensors["oft_blocks"])
    return {"oft_blocks": whole}
