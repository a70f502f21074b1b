"""The layers of a model that can be adapted, and their selection by name."""

import difflib
import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from common.errors import AdapterError, error_list
from lora_algos.adapter import AdapterLayer
from lora_algos.layer_op import ADAPTED_TYPES

Presets = dict[str, str]
"""Name of a model family's preset -> regular expression."""
COMPUTING_METHODS = ("forward", "_conv_forward")
MAX_SUGGESTIONS = 3


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every layer as it was before adapters were attached."""
    adapter_prefixes: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(adapter_prefixes):
            continue
        if isinstance(module, AdapterLayer):
            adapter_prefixes += (f"{name}.",)
            module = module.base_layer
        yield name, module


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every layer with a weight matrix that can be adapted, by name."""
    return {name: module for name, module in layers_of(model) if has_standard_forward(module)}


def has_standard_forward(module: nn.Module) -> bool:
    """Return whether a layer computes what its weight, bias and operation say.

    Subclasses with another computation do not, such as quantized layers. Neither do layers whose
    weight another module reads directly."""
    if not isinstance(module, ADAPTED_TYPES) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    for layer_type in ADAPTED_TYPES:
        if not isinstance(module, layer_type):
            continue
        for method in COMPUTING_METHODS:
            standard_method = getattr(layer_type, method, None)
            if standard_method and getattr(type(module), method) is not standard_method:
                return False
    return True


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every normalization layer with a weight, by name, in the layers of all libraries."""
    return {
        name: module
        for name, module in layers_of(model)
        if type(module).__name__.endswith("Norm")
        and isinstance(getattr(module, "weight", None), Tensor)
    }


class Matches(NamedTuple):
    """Layers that a pattern matches."""

    names: list[str]
    error: str
    """Message if the pattern is invalid or matches nothing, else empty."""


def match_layers(pattern: str, names: list[str]) -> Matches:
    """Return the names that a regular expression matches as a whole."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        return Matches([], f"not a regular expression ({error})")
    matching_names = [name for name in names if compiled.fullmatch(name)]
    error_text = "" if matching_names else "matches no layer"
    return Matches(matching_names, error_text)


def select_layers(model: nn.Module, targets: tuple[str, ...], presets: Presets) -> list[str]:
    """Return the layers that `targets`, presets or regular expressions, match, in model order.

    Raises AdapterError naming every target that is invalid or matches nothing."""
    names = list(adaptable_layers(model))
    selected_names: set[str] = set()
    errors = []
    for target in targets:
        matches = match_layers(presets.get(target, target), names)
        selected_names.update(matches.names)
        if matches.error:
            errors.append(f"{target}: {matches.error}{suggestion(target, [*presets, *names])}")
    if errors:
        errors.append(
            f"presets of this family: {', '.join(presets)}; a pattern must match a whole layer name"
        )
        raise AdapterError(error_list("--adapter.targets", errors))
    return [name for name in names if name in selected_names]


def suggestion(target: str, names: list[str]) -> str:
    """Return the end of a message that names similar presets and layers."""
    similar_names = difflib.get_close_matches(target, names, n=MAX_SUGGESTIONS, cutoff=0.3)
    return f"; did you mean {', '.join(similar_names)}" if similar_names else ""
