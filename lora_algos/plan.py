"""The specification of every adapted layer, from the config."""

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from common.errors import AdapterError, error_list
from lora_algos import ALGORITHMS, NORM_ALGORITHM, get_algorithm
from lora_algos.config import AdapterConfig, AdapterOptions, BypassMode, LayerSpec, Override
from lora_algos.targets import Presets, layers_of, match_layers, norm_layers, select_layers

Specs = dict[str, LayerSpec]
"""Layer name -> specification of its adapter."""
DROPOUT_SUFFIX = "dropout"


@dataclass(frozen=True)
class AdapterPlan:
    """The adapter section of the config, and the related options at its root."""

    config: AdapterConfig
    algorithm: str
    rank: int
    bypass_mode: BypassMode = "auto"

    def specs(self, model: nn.Module, presets: Presets) -> Specs:
        """Return the spec of every layer to adapt, in model order.

        Raises AdapterError for patterns that match nothing and options without an effect."""
        names = select_layers(model, self.config.targets, presets)
        overrides = self._overrides(names, presets)
        no_override = Override("")
        specs = {}
        for name in names:
            specs[name] = self._spec(overrides.get(name, no_override))
        self._check_options(model, specs)
        if self.config.train_norms:
            norm_spec = LayerSpec(algorithm=NORM_ALGORITHM, bias=self.config.train_biases)
            specs |= dict.fromkeys(norm_layers(model), norm_spec)
        return {name: specs[name] for name, _ in layers_of(model) if name in specs}

    def continued_specs(self, specs: Specs, presets: Presets) -> Specs:
        """Return the specs of an existing adapter with this config's training options.

        Raises AdapterError for overrides that match none of its layers."""
        overrides = self._overrides(list(specs), presets)
        continued = {}
        for name, spec in specs.items():
            lr_scale = overrides[name].lr_scale if name in overrides else None
            options = replace(
                spec.options,
                dropout=self.config.dropout,
                rank_dropout=self.config.rank_dropout,
                module_dropout=self.config.module_dropout,
            )
            continued[name] = replace(
                spec,
                bypass_mode=self.bypass_mode,
                options=options,
                lr_scale=first_set(lr_scale, spec.lr_scale),
            )
        return continued

    def _check_options(self, model: nn.Module, specs: Specs) -> None:
        """Raise AdapterError naming the options that change nothing for any layer."""
        options, default_options = self.config.options(), AdapterOptions()
        errors = []
        for item in fields(AdapterOptions):
            value = getattr(options, item.name)
            is_default = value == getattr(default_options, item.name)
            if is_default or item.name.endswith(DROPOUT_SUFFIX):
                continue
            if not self._is_supported(item.name, model, specs):
                errors.append(f"{item.name} = {value}")
        if errors:
            algorithms = ", ".join(sorted({spec.algorithm for spec in specs.values()}))
            heading = f"--adapter: options that no adapted layer ({algorithms}) supports"
            raise AdapterError(error_list(heading, errors))

    def _is_supported(
        self,
        option: str,
        model: nn.Module,
        specs: Specs,
    ) -> bool:
        """Return whether an option changes anything for one of the layers."""
        layers: dict[str, Any] = dict(layers_of(model))
        options = self.config.options()
        for name, spec in specs.items():
            algorithm = get_algorithm(spec.algorithm)
            if algorithm.supports_option(option, options, layers[name].weight.shape):
                return True
        return False

    def _overrides(self, names: list[str], presets: Presets) -> dict[str, Override]:
        """Return the override of each layer that has one. Raises AdapterError for invalid ones."""
        overrides: dict[str, Override] = {}
        errors = []
        for number, override in enumerate(self.config.overrides):
            pattern, algorithm = override.pattern, override.algorithm
            matches = match_layers(presets.get(pattern, pattern), names)
            if matches.error:
                errors.append(
                    f"{number}.pattern = {pattern}: {matches.error} among the adapted layers"
                )
            if algorithm not in (None, *ALGORITHMS):
                errors.append(
                    f"{number}.algorithm = {algorithm}: not one of {', '.join(ALGORITHMS)}"
                )
            overrides |= dict.fromkeys(matches.names, override)
        if errors:
            raise AdapterError(error_list("--adapter.overrides", errors))
        return overrides

    def _spec(self, override: Override) -> LayerSpec:
        rank = first_set(override.rank, self.rank)
        default_alpha = first_set(self.config.alpha, float(rank))
        return LayerSpec(
            rank=rank,
            alpha=first_set(override.alpha, default_alpha),
            algorithm=first_set(override.algorithm, self.algorithm),
            options=self.config.options(),
            bypass_mode=self.bypass_mode,
            lr_scale=first_set(override.lr_scale, 1.0),
            bias=self.config.train_biases,
        )


def first_set(value: Any, default: Any) -> Any:
    """Return `value` unless it is None."""
    return default if value is None else value
