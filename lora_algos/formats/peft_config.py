"""PEFT's adapter_config.json: made for a folder that PEFT loads, and read for the ranks' alphas, which it alone
holds."""

import json
import re

from torch import Tensor

from lora_algos.attach import listed
from lora_algos.config import AdapterError
from lora_algos.formats.layers import Layers

PEFT_TYPES = {"LoRA": "LORA", "DoRA": "LORA", "LoHa": "LOHA", "LoKr": "LOKR"}


def known_rank(tensors: dict[str, Tensor]) -> int | None:
    """The rank of a layer's update, if its tensors have one."""
    for name in ("lora_down.weight", "hada_t1", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a2.weight"):
        if name in tensors and tensors[name].ndim:
            return tensors[name].shape[0]
    return None


def rank_of(tensors: dict[str, Tensor]) -> int:
    """The rank of a layer's update; that from which PEFT divides nothing where there is none."""
    return known_rank(tensors) or max(tensors["lokr_w2"].shape[:2])


def has_rank(tensors: dict[str, Tensor]) -> bool:
    """Whether a layer's update has a rank: a rotation and a whole matrix have none."""
    return not tensors.keys() & {"diff", "oft_blocks"}


def alpha_of(tensors: dict[str, Tensor]) -> float:
    rank = rank_of(tensors)
    if {"lokr_w1", "lokr_w2"} <= tensors.keys():
        return float(rank)  # PEFT scales these too: by 1, then
    return float(tensors.get("alpha", rank))


def peft_config(layers: Layers, weights: dict[str, Tensor], algorithm: str) -> dict:
    """The config with which PEFT makes layers that these tensors fit. AdapterError if it makes none such."""
    ranks = {layer: rank_of(tensors) for layer, tensors in layers.items()}
    alphas = {layer: alpha_of(tensors) for layer, tensors in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config: dict = {
        "peft_type": PEFT_TYPES[algorithm],
        "target_modules": sorted(layers),
        "r": rank,
        "rank_pattern": {f"^{re.escape(layer)}": r for layer, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(layer)}": a for layer, a in alphas.items() if a != alpha},
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
    if algorithm in ("LoRA", "DoRA"):
        return {**config, "lora_alpha": alpha, "use_dora": algorithm == "DoRA", "use_rslora": False}
    config["alpha"] = alpha
    if algorithm == "LoHa":
        return {**config, "use_effective_conv2d": any("hada_t1" in tensors for tensors in layers.values())}
    return {**config, **lokr_options(layers, weights)}


def lokr_options(layers: Layers, weights: dict[str, Tensor]) -> dict:
    """The factor with which PEFT splits every layer as these were split."""
    from peft.tuners.lokr.layer import factorization

    splits = {}
    for layer, tensors in layers.items():
        out, channels = weights[layer].shape[:2]
        w1 = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
        a, c = w1.shape
        splits[layer] = ((out, a), (channels, c))
    wanted = {side[1] for split in splits.values() for side in split}
    differing = {
        factor: [name for name, split in splits.items() if any(factorization(n, factor)[0] != s for n, s in split)]
        for factor in (-1, *sorted(wanted, reverse=True))
    }
    factor = min(differing, key=lambda f: len(differing[f]))
    if differing[factor]:
        what = "--export.format peft: PEFT splits these layers of the LoKr otherwise, whatever its factor"
        raise AdapterError(listed(f"{what} (nearest {factor})", differing[factor]))
    both = any("lokr_w1_a" in tensors for tensors in layers.values())
    return {"decompose_factor": factor, "decompose_both": both, "use_effective_conv2d": False}


def alphas_of(metadata: dict[str, str], layers: Layers) -> dict[str, float]:
    """Alpha of each layer as PEFT's config in a file's metadata says, be it PEFT's own or diffusers'."""
    text = metadata.get("adapter_config") or metadata.get("lora_adapter_metadata")
    if not text:
        return {}
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdapterError(f"the adapter's config is not readable as JSON: {error}") from error
    # diffusers puts the component's name before each key
    bare = {re.sub(r"^(unet|transformer)\.", "", key): value for key, value in config.items()}
    rank = bare.get("r", 0)
    alpha = bare.get("lora_alpha", bare.get("alpha", rank))
    patterns = bare.get("alpha_pattern") or {}
    alphas = {}
    for layer, tensors in layers.items():
        own = next((a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", layer)), alpha)
        layer_rank = rank_of(tensors) if has_rank(tensors) else 1
        alphas[layer] = float(own) * (layer_rank**0.5 if bare.get("use_rslora") else 1.0)
    return alphas
