"""Comparison of a file's content with the adapter that it was written from."""

import json
import math

from torch import Tensor, nn

from adapter_files.files import base_weights
from adapter_files.reader import import_layers
from adapter_files.spellings import LayerSpellings
from adapter_files.writers import FileContent
from common.errors import AdapterError, error_list
from lora_algos.detection import detect_algorithm, layer_delta
from lora_algos.tensors import BIAS, LayerTensors, to_device
from lora_algos.traits import Layers

MAX_ERROR = 1e-6
"""Largest error of a file in fp32 that is read back, relative to the update."""


def verify_content(
    content: FileContent,
    layers: Layers,
    model: nn.Module,
    names: LayerSpellings,
) -> float:
    """Import `content` as any file, and compare its updates of the weights with those of `layers`.

    Returns the largest ||difference|| / ||update|| of a layer. Raises AdapterError naming keys
    that belong to no layer and layers that are missing: an incomplete file must not be kept."""
    metadata = dict(content.metadata)
    if content.config is not None:
        metadata["adapter_config"] = json.dumps(content.config)
    read_layers, errors = import_layers(content.tensors, metadata, model, names)
    weights = {name: weight.detach() for name, weight in base_weights(model).items()}
    for layer in layers.keys() - read_layers.keys():
        # no change of a part of a fused weight is written as nothing
        if changes_layer(layers[layer], weights[layer]):
            errors.append(f"{layer}: missing")
    if errors:
        heading = "the written content could not be read back and is not kept"
        raise AdapterError(error_list(heading, errors))
    layer_errors = [
        relative_error(tensors, layers[layer], weights[layer])
        for layer, tensors in read_layers.items()
    ]
    return max(layer_errors, default=0.0)


def changes_layer(tensors: LayerTensors, weight: Tensor) -> bool:
    """Return whether an adapter changes its layer at all."""
    if BIAS in tensors and tensors[BIAS].any():
        return True
    delta = delta_on_device(tensors, weight)
    return bool(delta.any())


def delta_on_device(tensors: LayerTensors, weight: Tensor) -> Tensor:
    """Return the update of a weight, on the device of the weight."""
    return layer_delta(to_device(tensors, weight.device), weight)


def relative_error(
    read_tensors: LayerTensors,
    tensors: LayerTensors,
    weight: Tensor,
) -> float:
    """Return ||difference|| / ||update|| of a layer, the larger one of weight and bias.

    Infinite if it is not finite."""
    delta = delta_on_device(tensors, weight)
    read_delta = delta_on_device(read_tensors, weight)
    size = delta.norm()
    if detect_algorithm(tensors).traits.fp32_tensors:
        size = size + weight.to(size.dtype).norm()
    errors = [ratio(read_delta - delta, size)]
    if BIAS in tensors:
        bias = tensors[BIAS]
        no_change = bias.new_zeros(())  # which a file of fused weights leaves out
        read_bias = read_tensors.get(BIAS, no_change)
        errors.append(ratio(read_bias - bias, bias.norm()))
    is_finite = all(map(math.isfinite, errors))
    return max(errors) if is_finite else math.inf


def ratio(error: Tensor, size: Tensor) -> float:
    """Return ||error|| / size, and ||error|| if the size is 0."""
    return float(error.norm() / size.where(size != 0, 1.0))
