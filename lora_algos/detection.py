"""The algorithm of a layer in a file, recognized by its tensors."""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from common.errors import AdapterError
from lora_algos import ALGORITHMS, get_algorithm
from lora_algos.algorithm import Algorithm
from lora_algos.tensors import LayerTensors

Registry = tuple[tuple[str, str], ...]


def all_algorithms() -> list[Algorithm]:
    """Return all registered algorithms."""
    return [get_algorithm(name) for name in ALGORITHMS]


def algorithms_by_detail() -> list[Algorithm]:
    """Return all algorithms; one that has another one's tensors and more comes before it."""
    return _algorithms_by_detail(tuple(ALGORITHMS.items()))


@cache
def _algorithms_by_detail(registry: Registry) -> list[Algorithm]:
    algorithms = [get_algorithm(name) for name, _ in registry]
    names = [set(algorithm.traits.names) for algorithm in algorithms]

    def num_extended(algorithm: Algorithm) -> int:
        """Count the algorithms whose tensors are a proper subset of this one's."""
        return sum(other_names < set(algorithm.traits.names) for other_names in names)

    return sorted(algorithms, key=num_extended, reverse=True)


def find_algorithm(tensors: LayerTensors) -> Algorithm | None:
    """Return the algorithm whose tensors a layer has in a file, or None."""
    for algorithm in algorithms_by_detail():
        if algorithm.matches_tensors(tensors):
            return algorithm
    return None


def detect_algorithm(tensors: LayerTensors) -> Algorithm:
    """Return the algorithm whose tensors a layer has in a file. Raises AdapterError for others."""
    algorithm = find_algorithm(tensors)
    if algorithm is None:
        names = ", ".join(sorted(tensors))
        raise AdapterError(f"{names}: these tensors belong to no supported algorithm")
    return algorithm


def algorithm_name(tensors: LayerTensors) -> str:
    """Return the name of `detect_algorithm`."""
    return detect_algorithm(tensors).name


def rank_of(tensors: LayerTensors) -> int | None:
    """Return the rank of a layer's update, if it has one."""
    algorithm = find_algorithm(tensors)
    return None if algorithm is None else algorithm.traits.rank(tensors)


def guess_weight_shape(shapes: Mapping[str, tuple[int, ...]]) -> torch.Size:
    """Return the shape of a layer's weight, from the shapes of its tensors.

    A convolution may come out as a matrix. (1, 1) if the tensors do not show it."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    algorithm = find_algorithm(tensors)
    if algorithm is None or algorithm.traits.weight_shape is None:
        return torch.Size((1, 1))
    try:
        return torch.Size(algorithm.traits.weight_shape(shapes))
    except (KeyError, IndexError, ValueError):
        return torch.Size((1, 1))  # reading the layer reports the damage


def layer_delta(tensors: LayerTensors, weight: Tensor) -> Tensor:
    """Return the update that a layer's tensors make of `weight`, fp32 or fp64."""
    return detect_algorithm(tensors).delta(tensors, weight)
