"""The description of an algorithm: its tensors, their first values, and the kernel that uses them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.kernels import WIDE_DTYPES, Factors, Kernel
from lora_algos.layer_op import LayerOp
from lora_algos.tensors import LayerTensors, Shapes, check_shapes
from lora_algos.traits import TensorTraits


class Algorithm(ABC):
    """An algorithm, stated in one file and registered in lora_algos/__init__.py. It has no state.

    The update itself is stated in the kernel's `delta` alone."""

    name: ClassVar[str]
    traits: ClassVar[TensorTraits]
    options: ClassVar[tuple[str, ...]] = ()
    """Fields of AdapterOptions that the algorithm supports, except the dropouts, which all do."""

    def supports_option(
        self,
        option: str,
        options: AdapterOptions,
        weight: torch.Size,
    ) -> bool:
        """Return whether an option changes anything for a layer with a weight of that shape."""
        return option in self.options

    def matches_tensors(self, tensors: LayerTensors) -> bool:
        """Return whether a layer in a file has this algorithm, or one that extends it."""
        return any(name in tensors for name in self.traits.detected_by)

    @abstractmethod
    def shapes(self, spec: LayerSpec, weight: torch.Size) -> Shapes:
        """Return the shapes of the tensors for a weight of that shape.

        Raises AdapterError, with a hint what would fit, if `spec` does not fit the weight."""

    def read_spec(self, tensors: LayerTensors, weight: torch.Size) -> tuple[LayerSpec, Shapes]:
        """Return the spec of a layer in a file, and the shapes that its tensors should have.

        Raises AdapterError if they do not fit a weight of that shape."""
        rank, alpha = self.traits.rank_and_alpha(tensors)
        spec = LayerSpec(rank, alpha, self.name, self.read_options(tensors))
        shapes = self.shapes(spec, weight)
        check_shapes(tensors, shapes, weight)
        return spec, shapes

    def read_options(self, tensors: LayerTensors) -> AdapterOptions:
        """Return the options that the tensors of a layer in a file show."""
        return AdapterOptions()

    @abstractmethod
    def make_kernel(
        self,
        op: LayerOp,
        spec: LayerSpec,
        weight: torch.Size,
        names: Iterable[str],
    ) -> Kernel:
        """Return the kernel for a layer with this operation, weight and names of tensors."""

    @abstractmethod
    def initialize(self, tensors: LayerTensors) -> None:
        """Fill new tensors in place, from torch's global generator."""

    def weight_constants(self, weight: Tensor) -> LayerTensors:
        """Return tensors that `factors` needs and that follow from the values of the weight."""
        return {}

    def initialize_from_constants(self, tensors: LayerTensors, constants: LayerTensors) -> None:
        """Fill the tensors that start from the weight's constants, in place."""
        return

    def factors(self, tensors: LayerTensors, spec: LayerSpec) -> Factors:
        """Return the kernel's factors, differentiably.

        IN: the layer's tensors in the order of `shapes`, its constants, and those of the weight."""
        return tuple(tensors.values())

    def without_update(
        self,
        tensors: LayerTensors,
        constants: LayerTensors,
        is_kept: Tensor,
    ) -> LayerTensors:
        """Return tensors without an update where `is_kept`, a boolean tensor (), is false.

        IN: tensors whose `dropout_axes` are zero there, and the constants of the weight."""
        return tensors

    def checkpoint_alpha(self, spec: LayerSpec) -> float:
        """Return the alpha that a file needs next to the tensors as they are trained."""
        return spec.scaling * spec.rank

    def describe_size(
        self,
        spec: LayerSpec,
        shapes: Shapes,
        scaling: str,
    ) -> str:
        """Return the size of the update in words. `scaling`: the scaling as an equation."""
        return f"rank {spec.rank}, {scaling}"

    def layer_class(self, base_layer: nn.Module) -> Callable[..., nn.Module] | None:
        """Return the class of adapter layers for `base_layer`; None: StandardLayer."""
        return None

    def delta(self, tensors: LayerTensors, weight: Tensor) -> Tensor:
        """Return the update that a layer's tensors in a file make of `weight`.

        In fp32, or in fp64 if the tensors are. Raises AdapterError if they do not fit."""
        spec, shapes = self.read_spec(tensors, weight.shape)
        op = LayerOp(max(0, weight.ndim - 2))
        kernel = self.make_kernel(op, spec, weight.shape, shapes)
        wide_tensors: LayerTensors = {}
        for name, shape in shapes.items():
            tensor = tensors[name]
            if tensor.dtype not in WIDE_DTYPES:
                tensor = tensor.float()
            wide_tensors[name] = tensor.reshape(shape)
        constants = self.weight_constants(weight)
        return kernel.delta(weight, self.factors({**wide_tensors, **constants}, spec))
