"""One layer's tensors by their names in a file: the rank, the alpha and the scaling they stand for,
and whether they fit."""

import torch
from torch import Tensor

from common.errors import AdapterError

Shapes = dict[str, tuple[int, ...]]


def known_rank(tensors: dict[str, Tensor]) -> int | None:
    """The rank of a layer's update, if its tensors have one."""
    for name in ("lora_down.weight", "hada_t1", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a2.weight"):
        if name in tensors and tensors[name].ndim:
            return tensors[name].shape[0]
    return None


def rank_and_alpha(tensors: dict[str, Tensor]) -> tuple[int, float]:
    """The rank of a layer's update, 1 where it has none, and its alpha: the rank, which scales by 1, if none is
    given."""
    rank = known_rank(tensors) or 1
    alpha = tensors.get("alpha")
    return rank, float(rank if alpha is None else alpha)


def constraint_of(tensors: dict[str, Tensor]) -> float:
    """A rotation's constraint, which is called alpha in a file; 0: it is free."""
    return max(0.0, float(tensors.get("alpha", 0.0)))


def moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A layer's tensors on a device; the alpha, which is read as a number, stays where it is."""
    return {
        name: tensor if name == "alpha" else tensor.to(device) for name, tensor in tensors.items()
    }


def scaling_of(tensors: dict[str, Tensor]) -> float:
    """alpha / rank, and 1 where nothing has a rank: then alpha means nothing."""
    rank, alpha = rank_and_alpha(tensors)
    return alpha / rank if known_rank(tensors) else 1.0


def bias_faults(tensors: dict[str, Tensor], channels: int, has_bias: bool | None) -> list[str]:
    """What is wrong with the change of a layer's bias, if there is one; `has_bias` None: not known."""
    if "diff_b" not in tensors:
        return []
    if has_bias is False:
        return ["diff_b: the layer has no bias"]
    there = tuple(tensors["diff_b"].shape)
    return (
        []
        if tensors["diff_b"].numel() == channels
        else [f"diff_b is {there} and should be {(channels,)}"]
    )


def fitted(tensors: dict[str, Tensor], shapes: Shapes, weight: torch.Size) -> Shapes:
    """`shapes`, if the tensors of a layer are these, be they flattened to matrices or not; else
    AdapterError."""
    given = {name: tensor for name, tensor in tensors.items() if name not in ("alpha", "diff_b")}
    missing, unknown = shapes.keys() - given.keys(), given.keys() - shapes.keys()
    faults = [f"{name} is missing" for name in sorted(missing)]
    faults += [
        f"{name} {tuple(given[name].shape)} does not belong there" for name in sorted(unknown)
    ]
    for name in shapes.keys() & given.keys():
        there, wanted = tuple(given[name].shape), shapes[name]
        if given[name].numel() != torch.Size(wanted).numel() or there[:1] != wanted[:1]:
            faults.append(f"{name} is {there} and should be {wanted}")
    if faults:
        raise AdapterError(f"for a weight of {tuple(weight)}: {'; '.join(faults)}")
    return shapes
