"""Tensors of one layer as programs write them: their errors, and their common form."""

from collections.abc import Iterator

import torch
from torch import Tensor

from adapter_files.keys import UNSUPPORTED_TENSORS
from lora_algos.detection import all_algorithms, find_algorithm
from lora_algos.tensors import ALPHA, BIAS, COMMON_NAMES, LayerTensors, bias_errors
from lora_algos.traits import Metadata


def layer_errors(tensors: LayerTensors, weight: Tensor, has_bias: bool | None) -> list[str]:
    """Return all errors of one layer's tensors in a file, for every algorithm.

    `has_bias` None: not known."""
    errors = [text for name, text in UNSUPPORTED_TENSORS.items() if name in tensors]
    for name, tensor in sorted(tensors.items()):
        errors += tensor_errors(name, tensor)
    for name in sorted(required_tensors(tensors) - tensors.keys()):
        errors.append(f"{name} is missing")
    errors += duplicate_errors(tensors)
    if weight.ndim < 2:
        errors += norm_errors(tensors)
    is_guessed_shape = has_bias is None and weight.is_meta
    if not is_guessed_shape:
        errors += bias_errors(tensors, weight.shape[0], has_bias)
    return errors


def tensor_errors(name: str, tensor: Tensor) -> Iterator[str]:
    """Yield errors of the shape and the values of one tensor."""
    shape = tuple(tensor.shape)
    if not tensor.numel():
        yield f"{name} is {shape}: empty"
    elif name == ALPHA and tensor.numel() > 1:
        yield f"{name} is {shape}: not one number"
    elif tensor.ndim < 2 and not can_be_vector(name):
        yield f"{name} is {shape}: not a matrix"
    if not tensor.float().isfinite().all():
        yield f"{name}: not finite (NaN or infinite values)"


def can_be_vector(name: str) -> bool:
    """Return whether a tensor may have fewer than two dimensions."""
    if name in COMMON_NAMES or name in UNSUPPORTED_TENSORS:
        return True
    return any(name in algorithm.traits.vectors for algorithm in all_algorithms())


def required_tensors(tensors: LayerTensors) -> set[str]:
    """Return the tensors without which those of the layer cannot be used."""
    required_names: set[str] = set()
    for algorithm in all_algorithms():
        for group in algorithm.traits.groups:
            if tensors.keys() & {*group}:
                required_names |= {*group}
        for name, needed_name in algorithm.traits.needs.items():
            if name in tensors:
                required_names.add(needed_name)
    return required_names


def duplicate_errors(tensors: LayerTensors) -> Iterator[str]:
    """Yield errors of tensors that state the same numbers in two forms."""
    for algorithm in all_algorithms():
        for foreign_name, name in algorithm.traits.files.alternatives.items():
            if foreign_name in tensors and name in tensors:
                yield f"{foreign_name} and {name}: two forms of the same tensor"


def norm_errors(tensors: LayerTensors) -> Iterator[str]:
    """Yield errors of tensors that do not fit a normalization layer."""
    norm_tensors = {*COMMON_NAMES}
    for algorithm in all_algorithms():
        if algorithm.traits.adapts_norms:
            norm_tensors |= {*algorithm.traits.names}
    other_names = sorted(tensors.keys() - norm_tensors)
    if other_names:
        supported_names = " and ".join(sorted(norm_tensors - {ALPHA}))
        yield (
            f"{', '.join(other_names)}: the layer is a normalization; "
            f"it can only have {supported_names}"
        )


def widen(tensors: LayerTensors) -> LayerTensors:
    """Return the tensors in fp32; those in fp64 stay."""
    wide_tensors = {}
    for name, tensor in tensors.items():
        wide_tensors[name] = tensor if tensor.dtype == torch.float64 else tensor.float()
    return wide_tensors


def with_alpha(tensors: LayerTensors, metadata: Metadata) -> LayerTensors:
    """Return a layer's tensors with the alpha that a missing one means, and in ComfyUI's unit."""
    algorithm = find_algorithm(tensors)
    if algorithm is None:
        return tensors
    traits = algorithm.traits
    alpha = tensors.get(ALPHA)
    if alpha is None:
        default_alpha = traits.files.default_alpha
        if default_alpha is None:
            default_alpha = traits.rank(tensors)
        if default_alpha is None:
            return tensors
        alpha = torch.tensor(float(default_alpha))
    has_lycoris_unit = metadata.get("ss_network_module", "").startswith("lycoris")
    if traits.files.lycoris_alpha_unit is not None and has_lycoris_unit:
        alpha = alpha * traits.files.lycoris_alpha_unit(tensors)
    return {**tensors, ALPHA: alpha}


def without_foreign_tensors(tensors: LayerTensors) -> LayerTensors:
    """Return a layer's valid tensors with those of other programs rewritten as ours."""
    algorithm = find_algorithm(tensors)
    if algorithm is None:
        return tensors
    return algorithm.traits.files.import_tensors(tensors)


def for_weight(tensors: LayerTensors, weight: Tensor, metadata: Metadata) -> LayerTensors:
    """Return a layer's tensors with those that depend on the weight rewritten as ours."""
    algorithm = find_algorithm(tensors)
    if algorithm is None:
        return tensors
    return algorithm.traits.files.import_for_weight(tensors, weight, metadata)


def bias_of(tensors: LayerTensors) -> LayerTensors:
    """Return the change of a layer's bias alone, if it has one."""
    return {BIAS: tensors[BIAS]} if BIAS in tensors else {}
