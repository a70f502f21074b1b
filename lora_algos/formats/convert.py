"""One layer's update as another algorithm's: exactly, as a LoRA or as a whole matrix, or nearly, as a LoRA of given
rank.

Tensors in and out are of one layer, under the names that the adapters here have, alpha among them.
"""

import torch
from torch import Tensor

from lora_algos import get_algorithm
from lora_algos.attach import algorithm_of
from lora_algos.config import AdapterError
from lora_algos.loha import khatri_rao


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
    if algorithm == "LoHa" and "hada_t1" not in tensors:
        w1_a, w1_b, w2_a, w2_b = (tensors[f"hada_w{i}_{side}"] for i in (1, 2) for side in "ab")
        rank = w1_a.shape[1]
        up, down = khatri_rao(w1_a, w1_b, w2_a, w2_b)
        scaling = float(tensors.get("alpha", rank)) / rank
        return {**as_lora(up * scaling, down, weight), **bias_of(tensors)}
    if algorithm == "LoKr":
        return {**lokr_as_lora(tensors, weight), **bias_of(tensors)}
    raise AdapterError(f"{algorithm} is no LoRA of a rank below the layer's; lora-svd makes one that is near it")


def lokr_as_lora(tensors: dict[str, Tensor], weight: torch.Size) -> dict[str, Tensor]:
    """(u1 v1) (x) (u2 v2) = (u1 (x) u2)(v1 (x) v2); a whole factor is split by the identity on its smaller side."""
    (u1, v1), (u2, v2) = (halves(tensors, f"lokr_w{i}") for i in (1, 2))
    rank = next((tensors[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in tensors), 0)
    scaling = float(tensors.get("alpha", rank)) / rank if rank else 1.0
    return as_lora(torch.kron(u1, u2) * scaling, torch.kron(v1, v2), weight)


def halves(tensors: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    if name not in tensors:
        return tensors[f"{name}_a"], tensors[f"{name}_b"]
    whole = tensors[name].flatten(1)
    identity = torch.eye(min(whole.shape), dtype=whole.dtype, device=whole.device)
    return (identity, whole) if whole.shape[0] <= whole.shape[1] else (whole, identity)


def svd(tensors: dict[str, Tensor], weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values (u, s, v) of a layer's update as a matrix (out, in * kernel).

    Of an update that is a product of thin factors only these are decomposed, the whole matrix is never formed.
    """
    try:
        exact = lora_exact(tensors, weight.shape)
        up, down = exact["lora_up.weight"].flatten(1), exact["lora_down.weight"].flatten(1)
    except (AdapterError, KeyError):
        return svd_of(delta_of(tensors, weight))
    if down.shape[0] >= min(up.shape[0], down.shape[1]):
        return svd_of(delta_of(tensors, weight))
    scaling = float(exact.get("alpha", down.shape[0])) / down.shape[0]
    (left, a), (right, b) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(a @ b.T * scaling)
    return left @ u, s, v @ right.T


def svd_of(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(delta.flatten(1), full_matrices=False)


def lora_svd(parts: tuple[Tensor, Tensor, Tensor], rank: int, weight: torch.Size) -> tuple[dict[str, Tensor], float]:
    """The nearest LoRA of at most that rank to an update decomposed by `svd`, and ||error|| / ||update||."""
    u, s, v = parts
    root = s[:rank].sqrt()
    lora = as_lora(u[:, :rank] * root, root[:, None] * v[:rank], weight)
    return lora, float(s[rank:].norm() / s.norm().clamp_min(1e-30))


def nearest_lora(tensors: dict[str, Tensor], weight: Tensor, rank: int) -> tuple[dict[str, Tensor], float]:
    """A layer as the nearest LoRA of at most `rank`, and ||error|| / ||update||; what is no matrix stays as it is."""
    if weight.ndim < 2:
        return tensors, 0.0
    lora, error = lora_svd(svd(tensors, weight), rank, weight.shape)
    return {**lora, **bias_of(tensors)}, error


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """The least rank that keeps this share of the sum of squares."""
    kept = singular_values.square().cumsum(0) / singular_values.square().sum().clamp_min(1e-30)
    return min(int((kept < energy).sum()) + 1, singular_values.numel())
