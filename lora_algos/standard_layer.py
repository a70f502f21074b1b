"""The adapter layer of most algorithms, and the choice of a layer's class."""

from typing import Any

import torch
from torch import nn

from lora_algos import get_algorithm
from lora_algos.adapter import AdapterLayer
from lora_algos.algorithm import Algorithm
from lora_algos.config import LayerSpec
from lora_algos.frozen_weight import stored_weight
from lora_algos.tensors import LayerTensors, Shapes

PASSED_ATTRIBUTES = {
    "weight",
    "bias",
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
}
"""Attributes that models and pipelines read from a layer; PEFT's layers pass them on too."""


class StandardLayer(AdapterLayer, nn.Module):
    """An adapter layer that registers its parameters under their names in a file, `_` for `.`."""

    def __init__(
        self,
        base_layer: nn.Module,
        algorithm: Algorithm,
        spec: LayerSpec,
        shapes: Shapes | None = None,
    ):
        """`shapes`: those of an existing adapter; None: as `spec` says."""
        super().__init__()
        self.base_layer = base_layer
        weight = stored_weight(base_layer)
        device = weight.device
        if shapes is None:
            shapes = algorithm.shapes(spec, weight.shape)
        initial_device = "meta" if weight.is_meta else "cpu"
        values: LayerTensors = {}
        for name, shape in shapes.items():
            values[name] = torch.empty(shape, dtype=torch.float32, device=initial_device)
        with torch.no_grad():
            algorithm.initialize(values)
        self.tensor_names = tuple(values)
        for name, value in values.items():
            self.register_parameter(attribute_name(name), nn.Parameter(value.to(device)))
        self.setup(base_layer, algorithm, spec)

    def update_tensors(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self, attribute_name(name)) for name in self.tensor_names}

    def __getattr__(self, name: str) -> Any:
        if name in PASSED_ATTRIBUTES:
            return getattr(self.base_layer, name)
        return super().__getattr__(name)


def attribute_name(tensor_name: str) -> str:
    """Return the name under which a module registers a tensor."""
    return tensor_name.replace(".", "_")


def adapt_layer(
    base_layer: nn.Module,
    spec: LayerSpec,
    shapes: Shapes | None = None,
) -> nn.Module:
    """Return `base_layer` with an adapter. `shapes`: those of an existing adapter."""
    algorithm = get_algorithm(spec.algorithm)
    layer_class = algorithm.layer_class(base_layer)
    if layer_class is None:
        layer_class = StandardLayer
    return layer_class(base_layer, algorithm, spec, shapes)
