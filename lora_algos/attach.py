"""Attaching adapters to the layers of a model: new ones, or those of a file."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from common.errors import AdapterError, error_list
from lora_algos import get_algorithm
from lora_algos.adapted_model import AdaptedModel
from lora_algos.adapter import AdapterLayer
from lora_algos.config import LayerSpec
from lora_algos.detection import detect_algorithm
from lora_algos.plan import AdapterPlan, Specs
from lora_algos.standard_layer import adapt_layer
from lora_algos.targets import layers_of
from lora_algos.tensors import BIAS, LayerTensors, Shapes, bias_errors
from lora_algos.traits import Layers

Fitted = TypeVar("Fitted")


def attach(model: nn.Module, specs: Specs, seed: int) -> AdaptedModel:
    """Attach new adapters to the layers in `specs`, and freeze everything else.

    The first values of a layer are a function of `seed` and its name: the same on every process,
    for any other layers. The generators of CPU and GPU are left as they were. Raises AdapterError
    naming every layer that its spec does not fit."""
    check_specs(model, specs)
    layers: dict[str, Any] = dict(layers_of(model))
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        for name, spec in specs.items():
            # torch.manual_seed would reseed the GPU too
            torch.default_generator.manual_seed(layer_seed(seed, name))
            model.set_submodule(name, adapt_layer(layers[name], spec), strict=True)
    return AdaptedModel(model)


def check_specs(model: nn.Module, specs: Specs) -> None:
    """Raise AdapterError naming every layer that its spec does not fit. Reads no values."""
    layers: dict[str, Any] = dict(layers_of(model))
    errors = []
    for name, spec in specs.items():
        try:
            get_algorithm(spec.algorithm).shapes(spec, layers[name].weight.shape)
        except AdapterError as error:
            errors.append(f"{name}: {error}")
    if errors:
        raise AdapterError(error_list("the adapter's options do not fit the model", errors))


def layer_seed(seed: int, name: str) -> int:
    """Return the seed of a layer's first values."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class ExistingAdapter(NamedTuple):
    """The adapter of one layer in a file."""

    spec: LayerSpec
    shapes: Shapes


def attach_from_file(
    model: nn.Module,
    layers: Layers,
    import_errors: list[str],
    plan: AdapterPlan | None = None,
    presets: Mapping[str, str] = MappingProxyType({}),
) -> AdaptedModel:
    """Attach the adapters of a file, each with its own algorithm, rank, alpha and options.

    `layers` and `import_errors`: result of adapter_files.reader.import_layers. `plan`: its options
    of training are used, see AdapterPlan.continued_specs. Raises AdapterError naming all import
    errors and every shape that does not fit the model."""
    modules: dict[str, Any] = dict(layers_of(model))
    adapters = fitted_layers(model, layers, import_errors, existing_adapter)
    specs = {name: adapter.spec for name, adapter in adapters.items()}
    if plan is not None:
        specs = plan.continued_specs(specs, dict(presets))
    model.requires_grad_(False)
    for name, spec in specs.items():
        layer = adapt_layer(modules[name], spec, adapters[name].shapes)
        model.set_submodule(name, layer, strict=True)
        load_tensors(layer, layers[name])
    return AdaptedModel(model)


def fitted_layers(
    model: nn.Module,
    layers: Layers,
    import_errors: list[str],
    fit: Callable[[LayerTensors, Any], Fitted],
) -> dict[str, Fitted]:
    """Return the result of `fit` for the tensors and the module of each layer in a file.

    Raises AdapterError naming all import errors and all errors of `fit`."""
    modules: dict[str, Any] = dict(layers_of(model))
    fitted: dict[str, Fitted] = {}
    errors = list(import_errors)
    for name, tensors in layers.items():
        try:
            fitted[name] = fit(tensors, modules[name])
        except AdapterError as error:
            errors.append(f"{name}: {error}")
    if not errors and not fitted:
        errors.append("it holds no tensors")
    if errors:
        raise AdapterError(error_list("the adapter file does not fit the model", errors))
    return fitted


def existing_adapter(tensors: LayerTensors, module: Any) -> ExistingAdapter:
    """Return a layer's adapter in a file. Raises AdapterError if it does not fit the module."""
    shape = module.weight.shape
    algorithm = detect_algorithm(tensors)
    spec, shapes = algorithm.read_spec(tensors, shape)
    has_bias = getattr(module, "bias", None) is not None
    errors = bias_errors(tensors, shape[0], has_bias)
    if errors:
        raise AdapterError("; ".join(errors))
    spec = replace(spec, bias=BIAS in tensors)
    return ExistingAdapter(spec, shapes)


@torch.no_grad()
def load_tensors(layer: nn.Module, tensors: LayerTensors) -> None:
    """Copy a layer's tensors in a file into its adapter.

    Tensors of a convolution may be flattened to matrices."""
    assert isinstance(layer, AdapterLayer)
    for name, parameter in layer.trained_tensors().items():
        values = tensors[name].reshape(parameter.shape)
        parameter.copy_(values)
