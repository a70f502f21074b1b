"""One layer's update as another algorithm's: exactly, as a LoRA or as a whole matrix, or nearly, as
a LoRA of given rank.

Tensors in and out are of one layer, under the names that the adapters here have, alpha among them.
"""

import torch
from torch import Tensor

from common.errors import AdapterError
from lora_algos import get_algorithm
from lora_algos.attach import algorithm_of
from lora_algos.loha import khatri_rao
from lora_algos.low_rank import NOT_FINITE, finite_svd, thin_svd
from lora_algos.tensors import scaling_of


def delta_of(tensors: dict[str, Tensor], weight: Tensor) -> Tensor:
    """The update that a layer's tensors make of `weight`, fp32 or fp64."""
    return get_algorithm(algorithm_of(tensors)).delta_of_file(tensors, weight)


def full(tensors: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """The update as a matrix of its own."""
    return {"diff": delta_of(tensors, weight), **bias_of(tensors)}


def bias_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"diff_b": tensors["diff_b"]} if "diff_b" in tensors else {}


def as_lora(up: Tensor, down: Tensor, weight: torch.Size) -> dict[str, Tensor]:
    """A LoRA whose scaling is 1."""
    _, channels, *kernel = weight
    rank = down.shape[0]
    return {
        "lora_up.weight": up.reshape(-1, rank, *[1] * len(kernel)).contiguous(),
        "lora_down.weight": down.reshape(rank, channels, *kernel).contiguous(),
        "alpha": torch.tensor(float(rank)),
    }


def lora_exact(tensors: dict[str, Tensor], weight: torch.Size) -> dict[str, Tensor]:
    """The same function as a LoRA: LoHa's of rank r^2, LoKr's of the product of its factors' ranks."""
    algorithm = algorithm_of(tensors)
    if algorithm == "LoRA" or len(weight) < 2:
        return tensors
    if algorithm == "LoHa":
        up, down = khatri_rao(*(factor for i in (1, 2) for factor in flat_loha(tensors, i)))
        return {**as_lora(up * scaling_of(tensors), down, weight), **bias_of(tensors)}
    if algorithm == "LoKr":
        return {**lokr_as_lora(tensors, weight), **bias_of(tensors)}
    raise AdapterError(
        f"{algorithm} is no LoRA of a rank below the layer's; lora-svd makes one that is near it"
    )


def flat_loha(tensors: dict[str, Tensor], number: int) -> tuple[Tensor, Tensor]:
    """One of a LoHa's two products, as (out, rank) and (rank, in * kernel); of a core and w_b if
    there is one."""
    a, b = (tensors[f"hada_w{number}_{side}"] for side in "ab")
    if f"hada_t{number}" not in tensors:
        return a, b
    return a.T, torch.einsum("ij...,jn->in...", tensors[f"hada_t{number}"], b).flatten(1)


def lokr_as_lora(tensors: dict[str, Tensor], weight: torch.Size) -> dict[str, Tensor]:
    """(u1 v1) (x) (u2 v2) = (u1 (x) u2)(v1 (x) v2); a whole factor is split by the identity on its
    smaller side."""
    (u1, v1), (u2, v2) = (halves(tensors, f"lokr_w{i}") for i in (1, 2))
    return as_lora(torch.kron(u1, u2) * scaling_of(tensors), torch.kron(v1, v2), weight)


def halves(tensors: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    if name not in tensors:
        return tensors[f"{name}_a"], tensors[f"{name}_b"]
    whole = tensors[name].flatten(1)
    identity = torch.eye(min(whole.shape), dtype=whole.dtype, device=whole.device)
    return (identity, whole) if whole.shape[0] <= whole.shape[1] else (whole, identity)


def svd(tensors: dict[str, Tensor], weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values (u, s, v) of a layer's update as a matrix (out, in * kernel).

    Of an update that is a product of thin factors only these are decomposed, the whole matrix is
    never formed.
    """
    try:
        exact = lora_exact(tensors, weight.shape)
        up, down = exact["lora_up.weight"].flatten(1), exact["lora_down.weight"].flatten(1)
    except (AdapterError, KeyError):
        return svd_of(delta_of(tensors, weight))
    if down.shape[0] >= min(up.shape[0], down.shape[1]):
        return svd_of(delta_of(tensors, weight))
    u, s, v = (part.to(up.dtype) for part in thin_svd(up * scaling_of(exact), down))
    if not s.isfinite().all():
        raise AdapterError(NOT_FINITE)
    return u, s, v


def svd_of(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not delta.isfinite().all():
        raise AdapterError(NOT_FINITE)
    return finite_svd(delta.flatten(1))


def lora_svd(
    parts: tuple[Tensor, Tensor, Tensor], rank: int, weight: torch.Size
) -> tuple[dict[str, Tensor], float]:
    """The nearest LoRA of at most that rank to an update decomposed by `svd`, and ||error|| /
    ||update||."""
    u, s, v = parts
    root = s[:rank].sqrt()
    lora = as_lora(u[:, :rank] * root, root[:, None] * v[:rank], weight)
    return lora, float(s[rank:].norm() / s.norm().clamp_min(1e-30))


def nearest_lora(
    tensors: dict[str, Tensor], weight: Tensor, rank: int
) -> tuple[dict[str, Tensor], float]:
    """A layer as the nearest LoRA of at most `rank`, and ||error|| / ||update||; what is no matrix
    stays as it is."""
    if weight.ndim < 2:
        return tensors, 0.0
    lora, error = lora_svd(svd(tensors, weight), rank, weight.shape)
    return {**lora, **bias_of(tensors)}, error


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """The least rank that keeps this share of the sum of squares."""
    kept = singular_values.square().cumsum(0) / singular_values.square().sum().clamp_min(1e-30)
    return min(int((kept < energy).sum()) + 1, singular_values.numel())
