"""A model with adapters attached: their parameters, their state, and merging into the base."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import AdapterError, error_list
from lora_algos.adapter import AdapterLayer
from lora_algos.config import LayerSpec
from lora_algos.frozen_weight import frozen_weight, write_frozen_weight
from lora_algos.layer_op import add_update
from lora_algos.prepared import PreparedGroup
from lora_algos.tensors import ALPHA, BIAS, to_device


@dataclass(frozen=True)
class AdaptedModel:
    """A model with adapters attached.

    `deltas`, `merge` and `unmerge` are for users of the library; this program does not call them.
    """

    model: nn.Module

    def layers(self) -> dict[str, AdapterLayer]:
        """Return the adapted layers by the names of the layers that they replace."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, AdapterLayer)
        }

    def all_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of all adapters: `<layer>.<name in a file>` -> parameter."""
        parameters = {}
        for layer_name, layer in self.layers().items():
            for name, parameter in layer.trained_tensors().items():
                parameters[f"{layer_name}.{name}"] = parameter
        return parameters

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return `all_parameters` without those of frozen layers."""
        return {
            name: parameter
            for name, parameter in self.all_parameters().items()
            if parameter.requires_grad
        }

    def specs(self) -> dict[str, LayerSpec]:
        """Return the specification of each layer's adapter."""
        return {name: layer.spec for name, layer in self.layers().items()}

    def learning_rate_scales(self, loraplus_lr_ratio: float) -> dict[str, float]:
        """Return the factor of the learning rate of each of `named_parameters`."""
        scales = {}
        for layer_name, layer in self.layers().items():
            faster_tensors = layer.algorithm.traits.starts_at_zero
            for name, parameter in layer.trained_tensors().items():
                if not parameter.requires_grad:
                    continue
                scale = layer.spec.lr_scale
                if name in faster_tensors:
                    scale *= loraplus_lr_ratio
                scales[f"{layer_name}.{name}"] = scale
        return scales

    def _state(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint: the parameters, and constants of the layers."""
        state: dict[str, Tensor] = dict(self.all_parameters())
        for layer_name, layer in self.layers().items():
            for name, tensor in layer.constants().items():
                state[f"{layer_name}.{name}"] = tensor
        return state

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the adapters' state for a checkpoint: fp32, on the CPU.

        On meta if the model is."""
        state = {}
        for name, tensor in self._state().items():
            tensor = tensor.detach()
            if tensor.is_meta:
                state[name] = tensor.clone()
            else:
                state[name] = tensor.to("cpu", copy=True).contiguous()
        return state

    def alphas(self) -> dict[str, Tensor]:
        """Return the alphas that make an adapter file of `state_dict`: fp32, on the CPU."""
        alphas = {}
        for name, layer in self.layers().items():
            alpha = layer.algorithm.checkpoint_alpha(layer.spec)
            alphas[f"{name}.{ALPHA}"] = torch.tensor(alpha)
        return alphas

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy `state` into the adapters. Raises AdapterError unless all names and shapes match."""
        own_state = self._state()
        errors = state_errors(state, own_state)
        if errors:
            raise AdapterError(error_list("the adapter does not fit the model", errors))
        for name, tensor in own_state.items():
            tensor.copy_(state[name])

    @contextmanager
    def using(self, state: dict[str, Tensor]) -> Iterator[None]:
        """Load `state` for a block, then restore the adapters' own values."""
        own_state = self.state_dict()
        self.load_state_dict(state)
        try:
            yield
        finally:
            self.load_state_dict(own_state)

    @contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        """Multiply the updates by a factor in a block, as programs do that load the adapter.

        Each layer then also computes its base: its output is base + strength * update."""
        layers = self.layers().values()
        previous = [layer.strength for layer in layers]
        for layer in layers:
            layer.strength = strength
        try:
            yield
        finally:
            for layer, own_strength in zip(layers, previous, strict=True):
                layer.strength = own_strength

    def prepare_once_per_step(self) -> None:
        """Let layers keep what they compute from their factors until these change.

        Changes are seen by the tensors' versions and by steps of torch's optimizers. Call
        `lora_algos.prepared.parameter_updates.add()` after other writes through `tensor.data`, and
        `prepared.clear()` of a layer if you replace one of its parameters."""
        layers = list(self.layers().values())
        group = PreparedGroup(layers)
        for layer in layers:
            layer.prepared.group = group

    @torch.no_grad()
    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and update of every adapted layer: fp32, on the layer's device."""
        for name, layer in self.layers().items():
            yield name, layer.delta_weight()

    def merge(self) -> None:
        """Add the updates to the weights of the base, until `unmerge`."""
        for layer in self.layers().values():
            layer.merge()

    def unmerge(self) -> None:
        """Restore the weights of the base, bit for bit."""
        # if two layers share a weight, the first one holds the original values
        for layer in reversed(self.layers().values()):
            layer.unmerge()

    @torch.no_grad()
    def merge_into(self, model: nn.Module) -> None:
        """Add the updates to the weights of `model`, another copy of the base without adapters.

        Updates are computed from these weights: the adapters' base may have another dtype."""
        for name, layer in self.layers().items():
            merge_layer_into(layer, model.get_submodule(name))


def merge_layer_into(layer: AdapterLayer, target: Any) -> None:
    """Add a layer's update to the weight and bias of `target`, the same layer without adapter."""
    weight = frozen_weight(target)
    tensors = to_device(layer.file_tensors(), weight.device)
    delta = layer.algorithm.delta(tensors, weight)
    write_frozen_weight(target, add_update(weight, delta))
    if BIAS in tensors:
        bias = add_update(target.bias, tensors[BIAS])
        target.bias.copy_(bias)


def state_errors(state: dict[str, Tensor], own_state: dict[str, Tensor]) -> list[str]:
    """Return errors of a state whose names or shapes differ from the adapters' own state."""
    errors = []
    for name in sorted(state.keys() | own_state.keys()):
        if name not in state:
            errors.append(f"{name}: not in the file")
        elif name not in own_state:
            errors.append(f"{name}: not in the model")
        elif state[name].shape != own_state[name].shape:
            shape, own_shape = tuple(state[name].shape), tuple(own_state[name].shape)
            errors.append(f"{name}: {shape} in the file, {own_shape} in the model")
    return errors
