"""PEFT's adapter_config.json: written for a folder that PEFT loads, and read for the alphas, which
PEFT's tensors do not contain."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.errors import AdapterError, error_list
from lora_algos.algorithm import Algorithm
from lora_algos.detection import detect_algorithm, find_algorithm, rank_of
from lora_algos.tensors import ALPHA, LayerTensors
from lora_algos.traits import Layers, PeftTraits, TensorTraits, Weights

INITS_THAT_KEEP_THE_BASE = ("default", "gaussian", "eva", "mica", "true", "false")
"""PEFT's other initializations move a part of the base weight into the adapter."""
NUMBER_OPTIONS = ("r", "lora_alpha", "alpha")
PATTERN_OPTIONS = ("rank_pattern", "alpha_pattern")
COMPONENT_PREFIX = re.compile(r"^(unet|transformer)\.")
"""Prefix of options in the metadata of diffusers."""


def peft_traits(algorithm: Algorithm) -> PeftTraits:
    """Return the form of an algorithm in PEFT, which has it."""
    traits = algorithm.traits.files.peft
    assert traits is not None, algorithm.name
    return traits


def peft_config(layers: Layers, weights: Weights, algorithm: Algorithm) -> dict[str, Any]:
    """Return the config with which PEFT makes layers that these tensors fit.

    Raises AdapterError if no config does."""
    peft = peft_traits(algorithm)
    ranks = {layer: algorithm.traits.nominal_rank(tensors) for layer, tensors in layers.items()}
    alphas = {layer: peft_alpha(algorithm.traits, tensors) for layer, tensors in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": peft.peft_type,
        "target_modules": sorted(layers),
        "r": rank,
        "rank_pattern": patterns_of_others(ranks, rank),
        "alpha_pattern": patterns_of_others(alphas, alpha),
        "base_model_name_or_path": None,
        "inference_mode": True,
        peft.alpha_option: alpha,
        **peft.options(layers, weights),
    }


def patterns_of_others(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return pattern -> value of the layers whose value is not the default."""
    return {f"^{re.escape(layer)}": value for layer, value in values.items() if value != default}


def peft_alpha(traits: TensorTraits, tensors: LayerTensors) -> float:
    """Return the alpha with which PEFT scales a layer by the same factor.

    PEFT also scales layers without a rank: by 1 then."""
    if traits.rank(tensors) is None:
        return float(traits.nominal_rank(tensors) or 1)
    _, alpha = traits.rank_and_alpha(tensors)
    return alpha


def peft_tensors(tensors: LayerTensors, weight: Tensor) -> LayerTensors:
    """Return a layer's tensors under PEFT's names, without the alpha."""
    peft = peft_traits(detect_algorithm(tensors))
    renamed_tensors = {}
    for name, tensor in tensors.items():
        if name == peft.channel_vector and weight.ndim > 2:
            tensor = tensor.view(1, -1, *[1] * (weight.ndim - 2))
        if name != ALPHA:
            renamed_tensors[peft.tensor_names.get(name, name)] = tensor
    return renamed_tensors


def config_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return PEFT's config in a file's metadata, from PEFT or diffusers; empty if it has none.

    Raises AdapterError naming all options that cannot be used."""
    text = metadata.get("adapter_config") or metadata.get("lora_adapter_metadata")
    if not text:
        return {}
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise AdapterError(f"the adapter's config is not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"the adapter's config is not a JSON object: {text[:40]}")
    config = {COMPONENT_PREFIX.sub("", name): value for name, value in config.items()}
    errors = [*option_errors(config), *pattern_errors(config)]
    if errors:
        raise AdapterError(error_list("the adapter's config cannot be used", errors))
    return config


def option_errors(config: dict[str, Any]) -> list[str]:
    """Return errors of the numbers, and of an initialization that changes the base."""
    errors = []
    for name in NUMBER_OPTIONS:
        if name in config and not is_number(config[name]):
            errors.append(f"{name} = {config[name]!r}: not a number")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in INITS_THAT_KEEP_THE_BASE:
        errors.append(
            f"init_lora_weights = {init}: it moved a part of the base weight into the adapter, so "
            "the adapter does not fit the model itself. Save it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=<the adapter before "
            "training>), which converts it"
        )
    return errors


def pattern_errors(config: dict[str, Any]) -> list[str]:
    """Return errors of the options that have values by pattern."""
    errors = []
    for name in PATTERN_OPTIONS:
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            errors.append(f"{name} = {patterns!r}: not a JSON object")
            continue
        for pattern, value in patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                errors.append(f"{name}: {pattern} is not a regular expression ({error})")
            if not is_number(value):
                errors.append(f"{name}: {pattern} = {value!r}: not a number")
    return errors


def is_number(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def layer_option(
    config: dict[str, Any],
    name: str,
    layer: str,
    default: float,
) -> float:
    """Return a layer's value of an option with values by pattern, else the default."""
    for pattern, value in (config.get(name) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def scale_by_config(config: dict[str, Any], layer: str, tensors: LayerTensors) -> LayerTensors:
    """Return a layer's tensors with the alpha that PEFT's config gives them.

    PEFT also scales layers without a rank, in which alpha has no meaning here. Their scale is
    moved into a tensor."""
    rank = rank_of(tensors)
    default = config.get("lora_alpha", config.get("alpha", config.get("r", rank or 1)))
    alpha = layer_option(config, "alpha_pattern", layer, default)
    if rank is None:
        name = tensor_with_peft_scale(config, tensors)
        if not name:
            return tensors
        config_rank = layer_option(config, "rank_pattern", layer, config.get("r", 1)) or 1
        return {**tensors, name: tensors[name] * (alpha / config_rank)}
    if config.get("use_rslora"):
        alpha *= rank**0.5
    return {**tensors, ALPHA: torch.tensor(float(alpha))}


def tensor_with_peft_scale(config: dict[str, Any], tensors: LayerTensors) -> str:
    """Return the tensor of a layer without a rank that takes over PEFT's scale; empty if none."""
    algorithm = find_algorithm(tensors)
    peft = None if algorithm is None else algorithm.traits.files.peft
    if peft is None or peft.peft_type != config.get("peft_type"):
        return ""
    return peft.scaled_tensor if peft.scaled_tensor in tensors else ""
