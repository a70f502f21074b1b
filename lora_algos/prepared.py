"""Tensors that a layer's passes compute with, made from its factors.

By default every pass makes them again. A training makes them once per step, for all layers together
if they are multiples of factors: `AdaptedModel.prepare_once_per_step`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from common.precision import exact_products
from lora_algos.kernels import Factors, Kernel, Prepared


@dataclass
class UpdateCounter:
    """Counts updates that tensors' versions may not show, such as those through `tensor.data`."""

    count: int = 0

    def add(self, *_: object) -> None:
        """Count an update. WHEN: parameters were written past autograd."""
        self.count += 1


parameter_updates = UpdateCounter()
register_optimizer_step_post_hook(parameter_updates.add)


class PreparedFactors:
    """The result of `Kernel.prepare` for the present values of a layer's factors."""

    def __init__(self) -> None:
        self.group: PreparedGroup | None = None
        """Layers that are prepared together; None: nothing is kept."""
        self.clear()

    def clear(self) -> None:
        """Forget everything. WHEN: tensors were replaced, for example on another device."""
        self.factors: Factors = ()
        self.values: Prepared = ()
        self.dtype: torch.dtype | None = None
        self.count = -1
        self.versions: list[int] = []

    def is_current(self, dtype: torch.dtype) -> bool:
        """Return whether `factors` and `values` are those of the present tensors, for `dtype`.

        The factors are parameters then."""
        if self.dtype is not dtype or self.count != parameter_updates.count:
            return False
        return self.versions == [factor._version for factor in self.factors]

    def put(self, factors: Factors, values: Prepared, dtype: torch.dtype) -> None:
        """Keep values that were made from the present values of `factors`, which are parameters."""
        self.factors = factors
        self.values = values
        self.dtype = dtype
        self.count = parameter_updates.count
        self.versions = [factor._version for factor in factors]


@torch.no_grad()
def prepare(kernel: Kernel, weight: Tensor, factors: Factors, dtype: torch.dtype) -> Prepared:
    """Return what a kernel computes with, as tensors without a graph.

    TF32 would make rotations that are not orthogonal."""
    values = tuple(factor.detach() for factor in factors)
    if torch.compiler.is_compiling():  # it does not follow a change of the setting
        return kernel.prepare(weight, values, dtype)
    with exact_products():
        return kernel.prepare(weight, values, dtype)


class PreparedLayer(Protocol):
    """An adapter layer, as a group sees it."""

    @property
    def kernel(self) -> Kernel: ...

    @property
    def prepared(self) -> PreparedFactors: ...

    def parameter_factors(self) -> Factors | None: ...


class PreparedGroup:
    """Layers whose multiples of factors are computed in a few operations for all of them."""

    def __init__(self, layers: Sequence[PreparedLayer]):
        self.layers: list[PreparedLayer] = []
        for layer in layers:
            if layer.kernel.terms():
                self.layers.append(layer)
        self.count = -1
        """Number of parameter updates at the last computation."""
        self.requests: list[Request] = []
        self.multiples = Multiples()

    @torch.no_grad()
    def prepare_after_update(self, dtype: torch.dtype) -> None:
        """Prepare all layers for activations of `dtype`, unless this was done since the last update.

        Layers whose factors are not parameters prepare their own."""
        if self.count == parameter_updates.count:
            return
        self.count = parameter_updates.count
        if not self.requests or not all(request.is_current() for request in self.requests):
            self._collect_requests()
        values = self.multiples.compute(dtype)
        for request in self.requests:
            layer_values = [values[index] for index in request.indices]
            request.prepared.put(
                request.factors,
                tuple(layer_values),
                dtype,
            )

    def _collect_requests(self) -> None:
        """Ask all layers for their factors. This takes several times as long as the multiples."""
        self.requests, self.multiples = [], Multiples()
        for layer in self.layers:
            factors = layer.parameter_factors()
            if factors is None:
                continue
            indices = []
            for term in layer.kernel.terms():
                index = self.multiples.add(factors[term.factor], term.scale)
                indices.append(index)
            request = Request(
                layer.prepared,
                factors,
                indices,
            )
            self.requests.append(request)


class Request(NamedTuple):
    """The multiples that one layer asks for."""

    prepared: PreparedFactors
    factors: Factors
    indices: list[int]
    """Indices of the multiples."""

    def is_current(self) -> bool:
        """Return whether the layer has forgotten nothing since it was prepared with these factors."""
        return self.prepared.factors is self.factors


class Multiples:
    """Multiples of tensors in another dtype, each computed once."""

    def __init__(self) -> None:
        self.sources: list[Tensor] = []
        self.scales: list[float] = []
        self.indices: dict[tuple[int, float], int] = {}

    def add(self, tensor: Tensor, scale: float) -> int:
        """Return the index of a multiple among the results of `compute`."""
        key = (id(tensor), scale)
        index = self.indices.get(key)
        if index is None:
            index = len(self.sources)
            self.indices[key] = index
            self.sources.append(tensor)
            self.scales.append(scale)
        return index

    def compute(self, dtype: torch.dtype) -> list[Tensor]:
        """Return all multiples of the present values. Those that need no change are the tensors
        themselves."""
        results = [source.detach() for source in self.sources]
        self._multiply(results)
        convert(results, dtype)
        return results

    def _multiply(self, tensors: list[Tensor]) -> None:
        """Replace the tensors that have a scale by their multiples."""
        indices = [index for index, scale in enumerate(self.scales) if scale != 1]
        if not indices:
            return
        scales = [self.scales[index] for index in indices]
        products = torch._foreach_mul([tensors[index] for index in indices], scales)
        replace(tensors, indices, products)


def convert(tensors: list[Tensor], dtype: torch.dtype) -> None:
    """Convert the tensors of another dtype, in one operation for all."""
    indices = [index for index, tensor in enumerate(tensors) if tensor.dtype != dtype]
    if not indices:
        return
    sources = [tensors[index] for index in indices]
    copies = [torch.empty_like(source, dtype=dtype) for source in sources]
    torch._foreach_copy_(copies, sources)
    replace(tensors, indices, copies)


def replace(tensors: list[Tensor], indices: list[int], new_tensors: Sequence[Tensor]) -> None:
    """Replace the tensors at some indices."""
    for index, tensor in zip(indices, new_tensors, strict=True):
        tensors[index] = tensor
