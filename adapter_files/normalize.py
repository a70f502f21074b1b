"""One layer's tensors: what the programs write, turned into what the adapters here are made of."""

import torch
from torch import Tensor

from common.errors import AdapterError
from lora_algos.low_rank import TINY, difference, norms_after, squared_norms
from lora_algos.tensors import bias_faults, scaling_of

Layers = dict[str, dict[str, Tensor]]
"""Layer -> a tensor's name here -> the tensor."""
NOT_READ = {
    "rescale": "an OFT with rescale, which ComfyUI and PEFT do not read either",
    "oft_R.weight": "an OFT of PEFT's, which rotates the layer's input: another function than everyone else's OFT",
    "set_weight": "a whole weight (set_weight)",
    "reshape_weight": "a weight of another shape (reshape_weight)",
    "bm.weight": "a GLoRA with a Tucker core",
}


TOGETHER = (
    ("lora_up.weight", "lora_down.weight"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ("hada_t1", "hada_t2"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
    ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
    ("initial_up", "initial_down"),
)
NEEDS = {
    "lora_mid.weight": "lora_down.weight",
    "dora_scale": "lora_down.weight",
    "lora_magnitude_vector": "lora_down.weight",
    "hada_t1": "hada_w1_a",
    "lokr_t2": "lokr_w2_a",
    "initial_up": "lora_down.weight",
}
ANY_SHAPE = (
    "alpha",
    "diff",
    "diff_b",
    "dora_scale",
    "lora_magnitude_vector",
)  # all others are matrices at least


def faults_of(tensors: dict[str, Tensor], weight: Tensor, has_bias: bool | None) -> list[str]:
    """All that is wrong with one layer's tensors in a file, whatever its algorithm; `has_bias`
    None: not known."""
    faults = [reason for name, reason in NOT_READ.items() if name in tensors]
    for name, tensor in sorted(tensors.items()):
        shape = tuple(tensor.shape)
        if not tensor.numel():
            faults.append(f"{name} is {shape}: empty")
        elif name == "alpha" and tensor.numel() > 1:
            faults.append(f"alpha is {shape}: not one number")
        elif name not in (*ANY_SHAPE, *NOT_READ) and tensor.ndim < 2:
            faults.append(f"{name} is {shape}: no matrix")
        if not tensor.float().isfinite().all():
            faults.append(f"{name}: not finite (NaN or infinite values)")
    needed = {name for group in TOGETHER if tensors.keys() & {*group} for name in group}
    needed |= {partner for name, partner in NEEDS.items() if name in tensors}
    faults += [f"{name} is missing" for name in sorted(needed - tensors.keys())]
    if {"dora_scale", "lora_magnitude_vector"} <= tensors.keys():
        faults.append("dora_scale and lora_magnitude_vector: two magnitudes")
    if weight.ndim < 2 and (strange := tensors.keys() - {"alpha", "diff", "diff_b"}):
        faults.append(
            f"{', '.join(sorted(strange))}: the layer is a normalization, which has diff and diff_b alone"
        )
    if has_bias is not None or not weight.is_meta:  # else the shape may be a guess
        faults += bias_faults(tensors, weight.shape[0], has_bias)
    return faults


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In fp32, or in fp64 what is that."""
    return {
        name: tensor if tensor.dtype == torch.float64 else tensor.float()
        for name, tensor in tensors.items()
    }


def without_cores(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one layer, in which there are no faults, with cores and starts worked in that the adapters here do
    not have."""
    found = dict(tensors)
    if "lora_mid.weight" in found:
        fold_mid(found)
    if "lokr_t2" in found:
        rebuild_lokr(found)
    if "initial_up" in found:
        subtract_start(found)
    return found


def with_magnitude(
    tensors: dict[str, Tensor], weight: Tensor, precompensated: bool
) -> dict[str, Tensor]:
    """With DoRA's magnitude as the adapters want it. AdapterError if that cannot be.

    `precompensated`: a dora_scale that is meant for programs that divide by the norm of the base
    weight alone.
    """
    found = dict(tensors)
    if "dora_scale" in found:
        found["lora_magnitude_vector"] = magnitude_of(
            found.pop("dora_scale"), found, weight, precompensated
        )
    elif "lora_magnitude_vector" in found:
        found["lora_magnitude_vector"] = found["lora_magnitude_vector"].flatten()
    return found


def fold_mid(tensors: dict[str, Tensor]) -> None:
    """A LoRA in Tucker form (up, mid, down) as one of the same rank with a whole kernel: mid is
    worked into down."""
    mid, down = tensors.pop("lora_mid.weight"), tensors["lora_down.weight"].flatten(1)
    tensors["lora_down.weight"] = torch.einsum("rj...,ji->ri...", mid, down)


def rebuild_lokr(tensors: dict[str, Tensor]) -> None:
    """A LoKr whose w2 is in Tucker form with an undivided w2, the scaling moved into it where it
    was w2's alone."""
    scaling = scaling_of(tensors)
    core, w2_a, w2_b = (tensors.pop(name) for name in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
    w2 = torch.einsum("ij...,jr->ir...", torch.einsum("ij...,ip->pj...", core, w2_a), w2_b)
    if "lokr_w1" in tensors:  # then nothing with a rank is left, and alpha means nothing
        w2 = w2 * scaling
    tensors["lokr_w2"] = (
        w2.contiguous()
    )  # torch.kron fails on what einsum makes, which ComfyUI takes for no change


def subtract_start(tensors: dict[str, Tensor]) -> None:
    """A LoRA that did not start from zero, of a checkpoint of ours, as one that did."""
    down = tensors["lora_down.weight"]
    given = (
        tensors["lora_up.weight"],
        down,
        tensors.pop("initial_up"),
        tensors.pop("initial_down"),
    )
    tensors["lora_up.weight"], tensors["lora_down.weight"] = difference(*given)
    tensors["alpha"] = tensors["alpha"] * (len(tensors["lora_down.weight"]) / len(down))


def magnitude_of(
    scale: Tensor, tensors: dict[str, Tensor], weight: Tensor, precompensated: bool
) -> Tensor:
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
    """||W + dW|| / ||W|| per output channel, dW being the LoRA's update: worked out where W is."""
    up, down = (tensors[f"lora_{side}.weight"].to(weight.device) for side in ("up", "down"))
    base = squared_norms(weight, up.dtype)
    moved = norms_after(weight, up, down, scaling_of(tensors), base)
    return (moved / base.clamp_min(TINY).sqrt()).to(tensors["lora_up.weight"].device)
