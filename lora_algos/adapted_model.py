"""The handle on a model with adapters attached: their parameters, their state, and the base with
them worked in."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import AdapterError, error_list
from lora_algos.adapter import Adapter
from lora_algos.config import LayerSpec
from lora_algos.layer_op import added
from lora_algos.tensors import moved


@dataclass(frozen=True)
class AdaptedModel:
    """A model with adapters attached: what the trainer holds on to."""

    model: nn.Module

    def layers(self) -> dict[str, Adapter]:
        """The adapted layers by the name that the layer itself had."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, Adapter)
        }

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """`<layer>.<name in a file>` -> trained parameter, of layers that are not frozen."""
        return {
            name: parameter
            for name, parameter in self.all_parameters().items()
            if parameter.requires_grad
        }

    def all_parameters(self) -> dict[str, nn.Parameter]:
        """`named_parameters`, and those of frozen layers."""
        return {
            f"{n}.{key}": p
            for n, layer in self.layers().items()
            for key, p in layer.trained().items()
        }

    def specs(self) -> dict[str, LayerSpec]:
        return {name: layer.spec for name, layer in self.layers().items()}

    def learning_rate_scales(self, loraplus_lr_ratio: float) -> dict[str, float]:
        """What the learning rate is multiplied by for each of `named_parameters`."""
        return {
            f"{name}.{key}": layer.spec.lr_scale
            * (loraplus_lr_ratio if key in layer.starts_at_zero else 1.0)
            for name, layer in self.layers().items()
            for key, parameter in layer.trained().items()
            if parameter.requires_grad
        }

    def _state(self) -> dict[str, Tensor]:
        constants = {
            f"{n}.{key}": t
            for n, layer in self.layers().items()
            for key, t in layer.constants().items()
        }
        return {**self.all_parameters(), **constants}

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of all that the adapters are, for a checkpoint: on the CPU (on meta for a model on
        meta), fp32."""
        return {
            name: t.detach().clone() if t.is_meta else t.detach().to("cpu", copy=True).contiguous()
            for name, t in self._state().items()
        }

    def alphas(self) -> dict[str, Tensor]:
        """What `state_dict` does not say, so that together they are an adapter file; on the CPU,
        fp32."""
        return {
            f"{name}.alpha": torch.tensor(layer.alpha_in_file())
            for name, layer in self.layers().items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies `state` into the adapters; names and shapes must match one to one."""
        here = self._state()
        faults = [f"{name}: not in the file" for name in here.keys() - state.keys()]
        faults += [f"{name}: not in the model" for name in state.keys() - here.keys()]
        faults += [
            f"{name}: {tuple(state[name].shape)} in the file, {tuple(tensor.shape)} in the model"
            for name, tensor in here.items()
            if name in state and state[name].shape != tensor.shape
        ]
        if faults:
            raise AdapterError(error_list("the adapter does not fit the model", sorted(faults)))
        for name, tensor in here.items():
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

    @torch.no_grad()
    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """Layer name and update (fp32, on the layer's device) of every adapted layer."""
        for name, layer in self.layers().items():
            yield name, layer.delta_weight()

    def merge(self) -> None:
        """Puts the updates into the base's weights, until `unmerge` restores these bit for bit."""
        for layer in self.layers().values():
            layer.merge()

    def unmerge(self) -> None:
        for layer in reversed(
            self.layers().values()
        ):  # of a weight that two layers share, the first holds the base
            layer.unmerge()

    @torch.no_grad()
    def merge_into(self, model: nn.Module) -> None:
        """Adds the updates to the weights of `model`, another copy of the base without adapters."""
        for name, layer in self.layers().items():
            target = model.get_submodule(name)
            weight: Tensor = target.weight  # type: ignore[assignment]
            tensors, alpha = (
                layer.in_file()
            )  # of this weight, not of the one trained on, which may be in another dtype
            here = moved(tensors, weight.device)
            delta = layer.delta_of_file(
                {**here, "alpha": torch.tensor(alpha, dtype=torch.float64)}, weight
            )
            weight.copy_(added(weight, delta))
            if layer.diff_b is not None:
                bias: Tensor = target.bias  # type: ignore[assignment]
                bias.copy_(added(bias, here["diff_b"]))
