"""PEFT's adapter_config.json: made for a folder that PEFT loads, and read for the ranks' alphas,
which it alone holds."""

import json
import math
import re

import torch
from torch import Tensor

from adapter_files.normalize import Layers
from common.errors import AdapterError, error_list
from lora_algos.tensors import known_rank, rank_and_alpha

# PEFT's initializations that leave the base weight as it is; others move part of it into the
# adapter
KEEP_THE_BASE = ("default", "gaussian", "eva", "mica", "true", "false")
PEFT_TYPES = {"LoRA": "LORA", "DoRA": "LORA", "LoHa": "LOHA", "LoKr": "LOKR"}


def rank_of(tensors: dict[str, Tensor]) -> int:
    """The rank of a layer's update; that from which PEFT divides nothing where there is none."""
    return known_rank(tensors) or max(tensors["lokr_w2"].shape[:2])


def has_rank(tensors: dict[str, Tensor]) -> bool:
    """Whether a layer's update has a rank: a rotation and a whole matrix have none."""
    return not tensors.keys() & {"diff", "oft_blocks"}


def alpha_of(tensors: dict[str, Tensor]) -> float:
    """What PEFT has to be told for the scaling to come out."""
    if {"lokr_w1", "lokr_w2"} <= tensors.keys():
        return float(rank_of(tensors))  # PEFT scales these too: by 1, then
    return rank_and_alpha(tensors)[1]


def peft_config(layers: Layers, weights: dict[str, Tensor], algorithm: str) -> dict:
    """The config with which PEFT makes layers that these tensors fit. AdapterError if it makes none
    such."""
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
        return {
            **config,
            "use_effective_conv2d": any("hada_t1" in tensors for tensors in layers.values()),
        }
    return {**config, **lokr_options(layers, weights)}


def lokr_options(layers: Layers, weights: dict[str, Tensor]) -> dict:
    """The factor with which PEFT splits every layer as these were split."""
    from peft.tuners.lokr.layer import factorization

    splits = {}
    for layer, tensors in layers.items():
        out, channels = weights[layer].shape[:2]
        w1 = (
            tensors["lokr_w1"]
            if "lokr_w1" in tensors
            else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
        )
        a, c = w1.shape
        splits[layer] = ((out, a), (channels, c))
    wanted = {side[1] for split in splits.values() for side in split}
    differing = {
        factor: [
            name
            for name, split in splits.items()
            if any(factorization(n, factor)[0] != s for n, s in split)
        ]
        for factor in (-1, *sorted(wanted, reverse=True))
    }
    factor = min(differing, key=lambda f: len(differing[f]))
    if differing[factor]:
        what = "--export.formats peft: PEFT splits these layers of the LoKr otherwise, whatever its factor"
        raise AdapterError(error_list(f"{what} (nearest {factor})", differing[factor]))
    both = any("lokr_w1_a" in tensors for tensors in layers.values())
    return {"decompose_factor": factor, "decompose_both": both, "use_effective_conv2d": False}


def config_in(metadata: dict[str, str]) -> dict:
    """PEFT's config in a file's metadata, be it PEFT's own or diffusers'; empty if there is none. AdapterError naming
    all that cannot be used."""
    text = metadata.get("adapter_config") or metadata.get("lora_adapter_metadata")
    if not text:
        return {}
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdapterError(f"the adapter's config is not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"the adapter's config is no JSON object: {text[:40]}")
    # diffusers puts the component's name before each key
    config = {re.sub(r"^(unet|transformer)\.", "", key): value for key, value in config.items()}
    if faults := [*config_faults(config), *pattern_faults(config)]:
        raise AdapterError(error_list("the adapter's config cannot be used", faults))
    return config


def config_faults(config: dict) -> list[str]:
    """What is wrong with a config's numbers, and an initialization that has changed the base."""
    faults = [
        f"{name} = {config[name]!r}: no number"
        for name in ("r", "lora_alpha", "alpha")
        if name in config and not is_number(config[name])
    ]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in KEEP_THE_BASE:
        faults.append(
            f"init_lora_weights = {init}: its base is not the model's, part of it was moved into the adapter. Save it "
            "with PEFT's save_pretrained(path_initial_model_for_weight_conversion=<the adapter as it was before "
            "training>), which makes it one for the model itself"
        )
    return faults


def pattern_faults(config: dict) -> list[str]:
    faults = []
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            faults.append(f"{name} = {patterns!r}: no JSON object")
            continue
        for pattern, value in patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                faults.append(f"{name}: {pattern} is no regular expression ({error})")
            if not is_number(value):
                faults.append(f"{name}: {pattern} = {value!r}: no number")
    return faults


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def patterned(config: dict, patterns: str, layer: str, default: float) -> float:
    """A layer's own value of those that a config gives by pattern, else the default."""
    found = (config.get(patterns) or {}).items()
    return next(
        (value for pattern, value in found if re.match(rf"(.*\.)?({pattern})$", layer)), default
    )


def scaled_by_config(config: dict, layer: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors with the scale that PEFT's config gives them: their alpha or, where nothing has a rank and
    alpha means nothing here, the scale itself worked in."""
    rank = known_rank(tensors)
    default = config.get("lora_alpha", config.get("alpha", config.get("r", rank or 1)))
    alpha = patterned(config, "alpha_pattern", layer, default)
    if config.get("peft_type") == "LOKR" and {"lokr_w1", "lokr_w2"} <= tensors.keys():
        asked = patterned(config, "rank_pattern", layer, config.get("r", 1)) or 1
        return {**tensors, "lokr_w1": tensors["lokr_w1"] * (alpha / asked)}
    if rank is None:
        return tensors
    return {
        **tensors,
        "alpha": torch.tensor(alpha * (rank**0.5 if config.get("use_rslora") else 1.0)),
    }
