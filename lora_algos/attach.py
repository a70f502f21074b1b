"""Choosing the layers of a model and attaching adapters to them."""

import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from common.errors import AdapterError, error_list
from lora_algos import ALGORITHMS, get_algorithm
from lora_algos.adapted_model import AdaptedModel
from lora_algos.adapter import Adapter
from lora_algos.config import (
    AdapterConfig,
    AdapterOptions,
    BypassMode,
    LayerSpec,
    Override,
)
from lora_algos.layer_op import ADAPTED_TYPES
from lora_algos.tensors import Shapes, bias_faults

# DoRA's layers have LoRA's tensors too, so it is asked first
ALGORITHMS_BY_DETAIL = sorted(ALGORITHMS, key=lambda name: name != "DoRA")


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every layer as it was before adapters were attached."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, Adapter):
            inside.append(f"{name}.")
            module = module.base_layer
        yield name, module


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer with a weight matrix that an adapter can be attached to, by name."""
    return {name: module for name, module in layers_of(model) if computes_as_adapted(module)}


def computes_as_adapted(module: nn.Module) -> bool:
    """Whether the layer's output is that of its kind: not of a subclass with a computation of its own, such as a
    quantized layer, nor of one whose weight another module reads past it."""
    if not isinstance(module, ADAPTED_TYPES) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    methods = [
        (kind, name)
        for kind in ADAPTED_TYPES
        for name in ("forward", "_conv_forward")
        if hasattr(kind, name)
    ]
    return all(
        getattr(type(module), n) is getattr(k, n) for k, n in methods if isinstance(module, k)
    )


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every normalization layer that has a weight, by name: those of torch, diffusers and
    transformers alike."""
    return {
        name: module
        for name, module in layers_of(model)
        if type(module).__name__.endswith("Norm")
        and isinstance(getattr(module, "weight", None), Tensor)
    }


def select_layers(model: nn.Module, targets: tuple[str, ...], presets: dict[str, str]) -> list[str]:
    """Names of the layers that `targets` (preset names or regular expressions) match, in model
    order.

    Raises AdapterError naming every target that is no regular expression or matches nothing.
    """
    names = list(adaptable_layers(model))
    chosen: set[str] = set()
    faults = []
    for target in targets:
        matched, fault = matching(presets.get(target, target), names)
        if fault:
            near = difflib.get_close_matches(target, [*presets, *names], n=3, cutoff=0.3)
            faults.append(f"{target}: {fault}" + (f"; near it: {', '.join(near)}" if near else ""))
        chosen.update(matched)
    if faults:
        faults.append(
            f"presets of this family: {', '.join(presets)}; a pattern must match a whole layer name"
        )
        raise AdapterError(error_list("--adapter.targets", faults))
    return [name for name in names if name in chosen]


def matching(pattern: str, names: list[str]) -> tuple[list[str], str]:
    """The names that `pattern` matches as a whole, and what is wrong with it if there are none."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        return [], f"not a regular expression ({error})"
    matched = [name for name in names if compiled.fullmatch(name)]
    return matched, "" if matched else "matches no layer"


@dataclass(frozen=True)
class Plan:
    """What a run asks for: the adapter section, and the options of the same purpose at the root of
    the config."""

    config: AdapterConfig
    algorithm: str
    rank: int
    bypass_mode: BypassMode = "auto"

    def specs(self, model: nn.Module, presets: dict[str, str]) -> dict[str, LayerSpec]:
        """The spec of every layer to adapt, in model order."""
        names = select_layers(model, self.config.targets, presets)
        overrides = self._overrides(names, presets)
        specs = {name: self._spec(overrides.get(name, Override(""))) for name in names}
        self._refuse_unheeded(model, specs)
        if self.config.train_norms:
            specs |= dict.fromkeys(
                norm_layers(model), LayerSpec(algorithm="Full", bias=self.config.train_biases)
            )
        return {name: specs[name] for name, _ in layers_of(model) if name in specs}

    def trained_on(
        self, specs: dict[str, LayerSpec], presets: dict[str, str]
    ) -> dict[str, LayerSpec]:
        """The specs of the layers in a file, to be trained further as this plan says."""
        overrides, asked = self._overrides(list(specs), presets), self.config
        result = {}
        for name, spec in specs.items():
            rate = overrides[name].lr_scale if name in overrides else None
            options = replace(
                spec.options,
                dropout=asked.dropout,
                rank_dropout=asked.rank_dropout,
                module_dropout=asked.module_dropout,
            )
            rate = spec.lr_scale if rate is None else rate
            result[name] = replace(
                spec, bypass_mode=self.bypass_mode, options=options, lr_scale=rate
            )
        return result

    def _refuse_unheeded(self, model: nn.Module, specs: dict[str, LayerSpec]) -> None:
        """AdapterError naming the options that were set and mean nothing to any layer of the run."""
        layers: dict[str, Any] = dict(layers_of(model))
        asked, plain = self.config.options(), AdapterOptions()
        faults = []
        for option in (
            item.name for item in fields(AdapterOptions) if not item.name.endswith("dropout")
        ):
            value = getattr(asked, option)
            if value != getattr(plain, option) and not any(
                get_algorithm(spec.algorithm).heeds(option, asked, layers[name].weight.shape)
                for name, spec in specs.items()
            ):
                faults.append(f"{option} = {value}")
        if faults:
            algorithms = ", ".join(sorted({spec.algorithm for spec in specs.values()}))
            raise AdapterError(
                error_list(
                    f"--adapter: options that no adapted layer ({algorithms}) has a use for", faults
                )
            )

    def _overrides(self, names: list[str], presets: dict[str, str]) -> dict[str, Override]:
        chosen: dict[str, Override] = {}
        faults = []
        for number, override in enumerate(self.config.overrides):
            matched, fault = matching(presets.get(override.pattern, override.pattern), names)
            if fault:
                faults.append(
                    f"{number}.pattern = {override.pattern}: {fault} of those that are adapted"
                )
            if override.algorithm not in (None, *ALGORITHMS):
                faults.append(
                    f"{number}.algorithm = {override.algorithm}: not one of {', '.join(ALGORITHMS)}"
                )
            chosen |= dict.fromkeys(matched, override)
        if faults:
            raise AdapterError(error_list("--adapter.overrides", faults))
        return chosen

    def _spec(self, override: Override) -> LayerSpec:
        def chosen(value, default):
            return default if value is None else value

        rank = chosen(override.rank, self.rank)
        return LayerSpec(
            rank=rank,
            alpha=chosen(override.alpha, chosen(self.config.alpha, float(rank))),
            algorithm=chosen(override.algorithm, self.algorithm),
            options=self.config.options(),
            bypass_mode=self.bypass_mode,
            lr_scale=chosen(override.lr_scale, 1.0),
            bias=self.config.train_biases,
        )


def attach(model: nn.Module, specs: dict[str, LayerSpec], seed: int) -> AdaptedModel:
    """Attaches new adapters to the layers named in `specs` and freezes all else.

    The first values of a layer are a function of `seed` and its name: the same on every rank, whatever other layers are
    adapted. The global RNG is left as it was. Raises AdapterError naming every layer that its spec does not fit.
    """
    layers, faults = dict(layers_of(model)), []
    for name, spec in specs.items():
        try:
            weight: Tensor = layers[name].weight  # type: ignore[assignment]
            get_algorithm(spec.algorithm).shapes(spec, weight.shape)
        except AdapterError as error:
            faults.append(f"{name}: {error}")
    if faults:
        raise AdapterError(error_list("the adapter's options do not fit the model", faults))
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        for name, spec in specs.items():
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            torch.manual_seed(int.from_bytes(digest, "little"))
            adapter = get_algorithm(spec.algorithm).on(layers[name], spec)
            model.set_submodule(name, adapter, strict=True)  # type: ignore[arg-type]
    return AdaptedModel(model)


def algorithm_of(tensors: dict[str, Tensor]) -> str:
    """The algorithm whose tensors a layer has in a file; AdapterError if there is none."""
    for name in ALGORITHMS_BY_DETAIL:
        if get_algorithm(name).detects(tensors):
            return name
    raise AdapterError(f"{', '.join(sorted(tensors))}: tensors of no algorithm that is known here")


def attach_from_file(
    model: nn.Module,
    tensors: dict[str, dict[str, Tensor]],
    unknown: list[str],
    plan: Plan | None = None,
    presets: Mapping[str, str] = MappingProxyType({}),
) -> AdaptedModel:
    """Attaches the adapters of a file, each layer with its own algorithm, rank, alpha and options.

    Of `plan` only counts how they are trained on: bypass_mode, the dropouts, and the overrides' lr_scale for the layers
    that they match, by `presets` or regular expressions.

    `tensors` has the file's tensors by layer, `alpha` among them, and `unknown` describes those that belong to no layer
    (formats.from_file). Raises AdapterError naming these and every shape that does not fit `model`.
    """
    layers, faults = dict(layers_of(model)), list(unknown)
    specs: dict[str, tuple[LayerSpec, Shapes]] = {}
    for name, given in tensors.items():
        try:
            weight: Tensor = layers[name].weight  # type: ignore[assignment]
            spec, shapes = get_algorithm(algorithm_of(given)).read_spec(given, weight.shape)
            if wrong := bias_faults(
                given, weight.shape[0], getattr(layers[name], "bias", None) is not None
            ):
                raise AdapterError("; ".join(wrong))
            specs[name] = replace(spec, bias="diff_b" in given), shapes
        except AdapterError as error:
            faults.append(f"{name}: {error}")
    if faults or not specs:
        raise AdapterError(
            error_list("the adapter file does not fit the model", faults or ["it holds no tensors"])
        )
    read = {name: spec for name, (spec, _) in specs.items()}
    asked = read if plan is None else plan.trained_on(read, dict(presets))
    model.requires_grad_(False)
    for name, spec in asked.items():
        adapter = get_algorithm(spec.algorithm).on(layers[name], spec, specs[name][1])
        model.set_submodule(name, adapter, strict=True)  # type: ignore[arg-type]
        with torch.no_grad():
            for key, parameter in adapter.trained().items():
                parameter.copy_(tensors[name][key].reshape(parameter.shape))
    return AdaptedModel(model)
