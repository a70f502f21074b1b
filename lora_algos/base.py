"""What is true of every adapter, once: choosing layers, attaching, reading, loading and merging.

The update of a layer is stated in one place, `Algorithm.delta_weight`; merging, export and the tests derive from it.
"""

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_algos import get_algorithm
from lora_algos.config import AdapterError

ADAPTED_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
MOST_LISTED = 20  # names in one error message


@dataclass(frozen=True)
class LayerSpec:
    """What one layer's adapter is made with; its update is scaled by alpha / rank."""

    rank: int
    alpha: float


class Algorithm(ABC):
    """One way to parameterise the update of a frozen Linear or Conv weight.

    Adapters are modules inside the model's own tree, so DDP, FSDP and `state_dict` see them. Their parameters are fp32
    whatever the base's dtype, and at initialisation the update is exactly zero.
    """

    name: str

    @abstractmethod
    def attach(self, model: nn.Module, specs: dict[str, LayerSpec]) -> None:
        """WHEN: once, on the frozen model, before it is prepared. IN: layer name -> spec. Uses torch's global RNG."""

    @abstractmethod
    def layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The adapted layers of `model`, each under the name it had before `attach`."""

    @abstractmethod
    def parameters(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        """The trained parameters of one adapted layer under their names in a file, such as `lora_up.weight`."""

    @abstractmethod
    def spec(self, layer: nn.Module) -> LayerSpec:
        """The spec that one adapted layer was attached with."""

    @abstractmethod
    def spec_of_file(self, tensors: dict[str, Tensor], weight: Tensor) -> LayerSpec:
        """The spec of a layer with `weight` whose tensors stand in a file; AdapterError if they do not fit it."""

    @abstractmethod
    def delta_weight(self, layer: nn.Module) -> Tensor:
        """The update of one adapted layer: fp32, the shape of its weight, scaling included."""


@dataclass(frozen=True)
class Adapted:
    """A model and the algorithm attached to it: what the trainer holds on to."""

    model: nn.Module
    algorithm: Algorithm

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """`<layer>.<name in a file>` -> trained parameter."""
        return {
            f"{name}.{key}": parameter
            for name, layer in self.algorithm.layers(self.model)
            for key, parameter in self.algorithm.parameters(layer).items()
        }

    def specs(self) -> dict[str, LayerSpec]:
        return {name: self.algorithm.spec(layer) for name, layer in self.algorithm.layers(self.model)}

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights on the CPU, in fp32: `<layer>.<name in a file>` -> tensor."""
        return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in self.named_parameters().items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies `state` into the trained weights; names and shapes must match one to one."""
        parameters = self.named_parameters()
        faults = [f"{name}: not in the file" for name in parameters.keys() - state.keys()]
        faults += [f"{name}: not in the model" for name in state.keys() - parameters.keys()]
        faults += [
            f"{name}: {tuple(state[name].shape)} in the file, {tuple(p.shape)} in the model"
            for name, p in parameters.items()
            if name in state and state[name].shape != p.shape
        ]
        if faults:
            raise AdapterError(listed("the adapter does not fit the model", sorted(faults)))
        for name, parameter in parameters.items():
            parameter.copy_(state[name])

    @torch.no_grad()
    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """Layer name and update (fp32, on the layer's device) of every adapted layer."""
        for name, layer in self.algorithm.layers(self.model):
            yield name, self.algorithm.delta_weight(layer)

    @torch.no_grad()
    def merge_into(self, model: nn.Module) -> None:
        """Adds the updates to the weights of `model`, another copy of the base without adapters."""
        for name, delta in self.deltas():
            weight = model.get_submodule(name).weight
            weight.add_(delta.to(weight))  # type: ignore[operator,arg-type]


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer an adapter can be attached to, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ADAPTED_TYPES)}


def select_layers(model: nn.Module, targets: tuple[str, ...], presets: dict[str, str]) -> list[str]:
    """Names of the layers that `targets` (preset names or regular expressions) match, in model order.

    Raises AdapterError naming every target that is no regular expression or matches nothing.
    """
    names = list(adaptable_layers(model))
    chosen: set[str] = set()
    faults = []
    for target in targets:
        try:
            pattern = re.compile(presets.get(target, target))
        except re.error as error:
            faults.append(f"{target}: not a regular expression ({error})")
            continue
        matched = [name for name in names if pattern.fullmatch(name)]
        if not matched:
            near = difflib.get_close_matches(target, [*presets, *names], n=3, cutoff=0.3)
            faults.append(f"{target}: matches no layer" + (f"; near it: {', '.join(near)}" if near else ""))
        chosen.update(matched)
    if faults:
        faults.append(f"presets of this family: {', '.join(presets)}; a pattern must match a whole layer name")
        raise AdapterError(listed("--adapter.targets", faults))
    return [name for name in names if name in chosen]


def attach(model: nn.Module, algorithm_name: str, specs: dict[str, LayerSpec], seed: int) -> Adapted:
    """Attaches new adapters to the layers named in `specs` and freezes all else.

    The initial weights are a function of `seed` alone: the same on every rank, and the global RNG is left as it was.
    """
    model.requires_grad_(False)
    algorithm = get_algorithm(algorithm_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        algorithm.attach(model, specs)
    return Adapted(model, algorithm)


def attach_from_file(
    model: nn.Module, algorithm_name: str, tensors: dict[str, dict[str, Tensor]], unknown: list[str]
) -> Adapted:
    """Attaches the adapters of a file with their own layers, ranks and alphas.

    `tensors` has the file's tensors by layer, `alpha` among them, and `unknown` describes those that belong to no layer
    (formats.from_file). Raises AdapterError naming these and every shape that does not fit `model`.
    """
    layers = adaptable_layers(model)
    algorithm = get_algorithm(algorithm_name)
    specs, faults = {}, list(unknown)
    for name, layer_tensors in tensors.items():
        try:
            specs[name] = algorithm.spec_of_file(layer_tensors, layers[name].weight)  # type: ignore[arg-type]
        except AdapterError as error:
            faults.append(f"{name}: {error}")
    if faults or not specs:
        raise AdapterError(listed("the adapter file does not fit the model", faults or ["it holds no tensors"]))
    adapted = attach(model, algorithm_name, specs, seed=0)
    state = {f"{n}.{k}": t for n, ts in tensors.items() for k, t in ts.items() if k != "alpha"}
    shapes = {name: parameter.shape for name, parameter in adapted.named_parameters().items()}
    adapted.load_state_dict({name: t.reshape(shapes[name]) if name in shapes else t for name, t in state.items()})
    return adapted


def listed(what: str, faults: list[str]) -> str:
    """One message for many faults, of which the first few are named."""
    more = [f"... and {len(faults) - MOST_LISTED} more"] if len(faults) > MOST_LISTED else []
    return "\n  ".join([f"{what}: {len(faults)} fault{'s' * (len(faults) > 1)}", *faults[:MOST_LISTED], *more])
