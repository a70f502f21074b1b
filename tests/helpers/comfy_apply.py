"""ComfyUI's formulas for adapter files (comfy/lora.py, comfy/weight_adapter/), written again from its source.

A table has the weight of each spelling: `Place`s of tests/helpers/comfy_keys.py, with rows to narrow to and halves to
swap. Nothing here is the project's code.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from helpers.comfy_keys import Place

SIDES = (("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight"))
SUFFIXES = (
    "lora_up.weight", "lora_down.weight", "lora_A.weight", "lora_B.weight", "alpha", "dora_scale", "hada_w1_a",
    "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b",
    "oft_blocks", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "diff", "diff_b",
)  # fmt: skip


def applied(
    file: Mapping[str, Tensor], table: Mapping[str, Place], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return `base` (name -> weight or bias, fp64) with the file applied.

    Raises AssertionError for a key that is not loaded."""
    result = {name: tensor.clone() for name, tensor in base.items()}
    left = set(file)
    for spelling, place in table.items():
        parts = {s: file[f"{spelling}.{s}"].double() for s in SUFFIXES if f"{spelling}.{s}" in file}
        left -= {f"{spelling}.{suffix}" for suffix in parts}
        if (bias := parts.pop("diff_b", None)) is not None:
            assert place.whole, "ComfyUI makes the key ().bias of a tuple"
            result[place.weight.removesuffix("weight") + "bias"] += bias
        if parts:
            first, count = place.rows or (0, result[place.weight].shape[0])
            change(result[place.weight][first : first + count], parts, place.swapped)
    assert not left, f"not loaded: {sorted(left)}"
    return result


def change(weight: Tensor, parts: dict[str, Tensor], swapped: bool) -> None:
    """Add one adapter to `weight` in place."""
    scale, update = update_of(weight, parts)
    update = (update * scale).reshape(weight.shape)
    if swapped:
        update = torch.cat(update.chunk(2)[::-1])
    if "dora_scale" in parts:
        norm = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
        weight.copy_((weight + update) * parts["dora_scale"] / norm)
    else:
        weight += update


def update_of(weight: Tensor, parts: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Return the scale, and the update without it."""
    alpha = float(parts["alpha"]) if "alpha" in parts else None
    for up, down in SIDES:
        if up in parts:
            return scaled(alpha, parts[down].shape[0]), parts[up].flatten(1) @ parts[down].flatten(
                1
            )
    if "hada_w1_a" in parts:
        first, second = (parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"] for i in (1, 2))
        return scaled(alpha, parts["hada_w1_b"].shape[0]), first * second
    if parts.keys() & {"lokr_w1", "lokr_w1_a"}:
        return lokr(parts, alpha)
    if "oft_blocks" in parts:
        assert alpha is not None, "ComfyUI fails on a rotation without alpha"
        stages = parts["oft_blocks"] if parts["oft_blocks"].ndim == 4 else parts["oft_blocks"][None]
        return 1.0, turned(weight, stages, alpha, butterfly=parts["oft_blocks"].ndim == 4) - weight
    if "a1.weight" in parts:
        on_input = weight @ parts["a1.weight"] @ parts["a2.weight"]
        return scaled(alpha, parts["a2.weight"].shape[0]), on_input + parts["b1.weight"] @ parts[
            "b2.weight"
        ]
    assert parts.keys() == {"diff"}, sorted(parts)
    return 1.0, parts["diff"]


def scaled(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def lokr(parts: dict[str, Tensor], alpha: float | None) -> tuple[float, Tensor]:
    rank, factors = None, []
    for side in ("lokr_w1", "lokr_w2"):
        if side in parts:
            factors.append(parts[side])
        else:
            rank = parts[f"{side}_b"].shape[0]
            factors.append(parts[f"{side}_a"] @ parts[f"{side}_b"])
    return 1.0 if rank is None else scaled(alpha, rank), torch.kron(*factors)


def turned(weight: Tensor, stages: Tensor, alpha: float, butterfly: bool) -> Tensor:
    q = stages - stages.transpose(-1, -2)
    norm = q.norm() + 1e-8
    if 0 < alpha < norm:
        q = q * alpha / norm
    eye, side = torch.eye(q.shape[-1], dtype=q.dtype), q.shape[-1]
    rotations = (eye + q) @ torch.linalg.inv(eye - q)
    if not butterfly:
        return torch.einsum(
            "knm,knc->kmc", rotations[0], weight.reshape(-1, side, weight.shape[1])
        ).reshape(weight.shape)
    for i, rotation in enumerate(rotations):
        half = 2**i * side // 2
        taken = (
            weight.unflatten(0, (-1, 2, half))
            .transpose(1, 2)
            .flatten(0, 2)
            .unflatten(0, (-1, side))
        )
        taken = torch.einsum("bij,bjc->bic", rotation, taken).flatten(0, 1)
        weight = taken.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
    return weight
