"""Tensors that a layer's passes compute with, made from its factors.

By default every pass makes them again. A training makes them once per step:
`AdaptedModel.prepare_once_per_step`.
"""

from dataclasses import dataclass

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
    """The result of `Kernel.prepare` for the present values of a layer's tensors."""

    def __init__(self) -> None:
        self.is_reused = False
        self.clear()

    def clear(self) -> None:
        """Forget the values. WHEN: the tensors moved to another device."""
        self.values: Prepared = ()
        self.sources: tuple[Tensor, ...] = ()
        self.state: tuple[object, ...] = ()

    def get(
        self,
        kernel: Kernel,
        sources: tuple[Tensor, ...],
        weight: Tensor,
        factors: Factors,
        dtype: torch.dtype,
    ) -> Prepared:
        """Return the values for activations of `dtype`, computed again if a source has changed.

        `sources`: the tensors that `factors` are made from."""
        # tensors of inference mode have no version
        if not self.is_reused or torch.is_inference_mode_enabled():
            return prepare(kernel, weight, factors, dtype)
        versions = [source._version for source in sources]
        state = (dtype, parameter_updates.count, *versions)
        if state != self.state or not same_tensors(sources, self.sources):
            self.values = prepare(kernel, weight, factors, dtype)
            self.state, self.sources = state, sources
        return self.values


def same_tensors(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    """Return whether two tuples hold the same objects."""
    if len(first) != len(second):
        return False
    return all(a is b for a, b in zip(first, second, strict=True))


@torch.no_grad()
def prepare(kernel: Kernel, weight: Tensor, factors: Factors, dtype: torch.dtype) -> Prepared:
    """Return what a kernel computes with, as tensors without a graph.

    TF32 would make rotations that are not orthogonal."""
    values = tuple(factor.detach() for factor in factors)
    with exact_products():
        return kernel.prepare(weight, values, dtype)
