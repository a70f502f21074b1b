"""One layer's tensors: what the programs write, turned into what the adapters here are made of."""

import torch
from torch import Tensor

from lora_algos.config import AdapterError

Layers = dict[str, dict[str, Tensor]]
"""Layer -> a tensor's name here -> the tensor."""
NOT_READ = {
    "rescale": "an OFT with rescale, which ComfyUI and PEFT do not read either",
    "oft_R.weight": "an OFT of PEFT's, which rotates the layer's input: another function than everyone else's OFT",
    "set_weight": "a whole weight (set_weight)",
    "reshape_weight": "a weight of another shape (reshape_weight)",
    "bm.weight": "a GLoRA with a Tucker core",
}


def canonical(tensors: dict[str, Tensor], weight: Tensor, precompensated: bool) -> dict[str, Tensor]:
    """The tensors of one layer as the adapters want them, in fp32. AdapterError if that cannot be.

    `precompensated`: a dora_scale that is meant for programs that divide by the norm of the base weight alone.
    """
    refused = [reason for name, reason in NOT_READ.items() if name in tensors]
    if refused:
        raise AdapterError("; ".join(refused))
    found = {name: tensor if tensor.dtype == torch.float64 else tensor.float() for name, tensor in tensors.items()}
    broken = [name for name, tensor in found.items() if not tensor.isfinite().all()]
    if broken:
        raise AdapterError(f"{', '.join(sorted(broken))}: not finite (NaN or infinite values)")
    if "lora_mid.weight" in found:
        fold_mid(found)
    if "lokr_t2" in found:
        rebuild_lokr(found)
    if "dora_scale" in found:
        found["lora_magnitude_vector"] = magnitude_of(found.pop("dora_scale"), found, weight, precompensated)
    elif "lora_magnitude_vector" in found:
        found["lora_magnitude_vector"] = found["lora_magnitude_vector"].flatten()
    return found


def fold_mid(tensors: dict[str, Tensor]) -> None:
    """A LoRA in Tucker form (up, mid, down) as one of the same rank with a whole kernel: mid is worked into down."""
    mid, down = tensors.pop("lora_mid.weight"), tensors["lora_down.weight"].flatten(1)
    tensors["lora_down.weight"] = torch.einsum("rj...,ji->ri...", mid, down)


def rebuild_lokr(tensors: dict[str, Tensor]) -> None:
    """A LoKr whose w2 is in Tucker form with an undivided w2, the scaling moved into it where it was w2's alone."""
    core, w2_a, w2_b = (tensors.pop(name) for name in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
    w2 = torch.einsum("ij...,jr->ir...", torch.einsum("ij...,ip->pj...", core, w2_a), w2_b)
    if "lokr_w1" in tensors:  # then nothing with a rank is left, and alpha means nothing
        w2 = w2 * (float(tensors.get("alpha", core.shape[0])) / core.shape[0])
    tensors["lokr_w2"] = w2.contiguous()  # torch.kron fails on what einsum makes, which ComfyUI takes for no change


def magnitude_of(scale: Tensor, tensors: dict[str, Tensor], weight: Tensor, precompensated: bool) -> Tensor:
    """DoRA's magnitude (out) from a dora_scale (out, 1...)."""
    out = weight.shape[0]
    if scale.numel() != out or (scale.ndim > 1 and scale.shape[0] != out):
        raise AdapterError(
            f"dora_scale is {tuple(scale.shape)}: a DoRA with one magnitude per input channel, where this trainer "
            f"and PEFT have one per output channel ({out})"
        )
    magnitude = scale.flatten()
    return magnitude * dora_compensation(tensors, weight) if precompensated else magnitude


def dora_compensation(tensors: dict[str, Tensor], weight: Tensor) -> Tensor:
    """||W + dW|| / ||W|| per output channel, dW being the LoRA's update."""
    up, down = tensors["lora_up.weight"].flatten(1), tensors["lora_down.weight"].flatten(1)
    rank = down.shape[0]
    scaling = float(tensors["alpha"]) / rank if "alpha" in tensors else 1.0
    flat = weight.flatten(1).to(up.dtype)
    return (flat + up @ down * scaling).norm(dim=1) / flat.norm(dim=1).clamp_min(1e-30)
