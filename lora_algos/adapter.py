"""What is true of every adapted layer, once. An algorithm adds its tensors' shapes, its first
values and its kernel.

An adapter is a module in the place of the layer it adapts, which it keeps as `base_layer`: DDP,
FSDP and `state_dict` see it, and nothing else of the model changes. Its parameters are fp32
whatever the base's dtype, and at first the update is exactly zero.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.kernels import WIDE, Additive, Branch, Kernel, Mode, Tensors, adapted
from lora_algos.layer_op import LayerOp, added, autocast_dtype, without_autocast
from lora_algos.tensors import Shapes


class Adapter(ABC):
    """An adapted layer. Tensors have the names they have in a file, such as `lora_up.weight`.

    A mixin, so that PEFT's layers can be adapters too; it is first among the bases.
    """

    algorithm: ClassVar[str]
    detected_by: ClassVar[tuple[str, ...]]
    """Tensors by which a layer in a file shows its algorithm."""
    rank_axis: ClassVar[dict[str, int]] = {}
    """Tensors without which there is no update, and the axis along which rank_dropout drops."""
    starts_at_zero: ClassVar[tuple[str, ...]] = ()
    """The factor of a product that LoRA+ trains faster."""
    own_options: ClassVar[tuple[str, ...]] = ()
    """Options that not every algorithm has and that mean something to this one."""
    multiplicative: ClassVar[bool] = False
    """What rank_dropout leaves is not scaled up."""

    base_layer: Any
    spec: LayerSpec
    op: LayerOp
    kernel: Kernel
    diff_b: nn.Parameter | None
    unmerged: tuple[Tensor, Tensor | None] | None
    training: bool

    @classmethod
    def detects(cls, tensors: dict[str, Tensor]) -> bool:
        """Whether a layer with these tensors in a file is of this algorithm, or of one that is made
        of it."""
        return any(name in tensors for name in cls.detected_by)

    @classmethod
    def heeds(cls, option: str, options: AdapterOptions, weight: torch.Size) -> bool:
        """Whether an option of those that not every algorithm has says anything to a layer with
        that weight."""
        return option in cls.own_options

    @classmethod
    @abstractmethod
    def shapes(cls, spec: LayerSpec, weight: torch.Size) -> Shapes:
        """The tensors for a weight of that shape; AdapterError if `spec` does not fit it, saying
        what would."""

    @classmethod
    @abstractmethod
    def make_kernel(
        cls, op: LayerOp, spec: LayerSpec, weight: torch.Size, names: Iterable[str]
    ) -> Kernel:
        """The computation for a layer with that operation and weight and tensors of these names."""

    @classmethod
    @abstractmethod
    def read_spec(cls, tensors: dict[str, Tensor], weight: torch.Size) -> tuple[LayerSpec, Shapes]:
        """The spec and the tensors' proper shapes of a layer in a file; AdapterError if they do not
        fit the weight."""

    @classmethod
    def factors_of(cls, tensors: dict[str, Tensor], spec: LayerSpec) -> Tensors:
        """What the kernel is given, differentiably."""
        return tuple(tensors.values())

    @classmethod
    @abstractmethod
    def on(cls, base_layer: nn.Module, spec: LayerSpec, shapes: Shapes | None = None) -> "Adapter":
        """`base_layer` adapted, with tensors of `shapes` if given (those of a file) instead of what
        `spec` asks for."""

    @abstractmethod
    def tensors(self) -> dict[str, nn.Parameter]:
        """The trained tensors of the update of the weight, in the order of `shapes`."""

    def setup(self, base_layer: Any, spec: LayerSpec) -> None:
        """What all constructors end with."""
        self.spec, self.op = spec, LayerOp.of(base_layer)
        self.kernel = self.make_kernel(self.op, spec, base_layer.weight.shape, self.tensors())
        self.unmerged = None
        self.diff_b = None
        if spec.bias and base_layer.bias is not None:
            self.diff_b = nn.Parameter(torch.zeros_like(base_layer.bias, dtype=torch.float32))

    def trained(self) -> dict[str, nn.Parameter]:
        """All trained tensors of the layer."""
        return {**self.tensors(), **({"diff_b": self.diff_b} if self.diff_b is not None else {})}

    def describe(self) -> str:
        """The algorithm and its scale, as an equation."""
        spec, root = self.spec, self.spec.options.rslora
        by = f"sqrt({spec.rank})" if root else str(spec.rank)
        rates = "" if spec.lr_scale == 1 else f", learning rate x {spec.lr_scale:g}"
        scaling = f"scaling = alpha / {'sqrt(rank)' if root else 'rank'} = {spec.alpha:g} / {by} = {spec.scaling:g}"
        return f"{self.algorithm}, {self.size(scaling)}{rates}"

    def size(self, scaling: str) -> str:
        return f"rank {self.spec.rank}, {scaling}"

    def constants(self) -> dict[str, Tensor]:
        """Tensors that are not trained and that a checkpoint must hold."""
        return {}

    @classmethod
    def from_weight(cls, weight: Tensor) -> Tensors:
        """Factors that the kernel wants besides the trained ones, made of the base's weight."""
        return ()

    @classmethod
    def delta_of_file(cls, tensors: dict[str, Tensor], weight: Tensor) -> Tensor:
        """The update that a layer's tensors in a file make of `weight`, fp32 (fp64 if they are); AdapterError if they
        do not fit."""
        spec, shapes = cls.read_spec(tensors, weight.shape)
        op = LayerOp(max(0, weight.ndim - 2))
        kernel = cls.make_kernel(op, spec, weight.shape, shapes)
        wide = {
            name: tensors[name] if tensors[name].dtype in WIDE else tensors[name].float()
            for name in shapes
        }
        fitting = {name: tensor.reshape(shapes[name]) for name, tensor in wide.items()}
        return kernel.delta(weight, (*cls.factors_of(fitting, spec), *cls.from_weight(weight)))

    def factors(self, tensors: dict[str, Tensor]) -> Tensors:
        """What the kernel is given, from the trained tensors or what dropout left of them."""
        return self.factors_of(tensors, self.spec)

    def in_file(self) -> tuple[dict[str, Tensor], float]:
        """The layer's tensors and alpha in a file, where the scaling is alpha / rank."""
        tensors: dict[str, Tensor] = {
            name: tensor.detach() for name, tensor in self.trained().items()
        }
        return tensors, self.alpha_in_file()

    def alpha_in_file(self) -> float:
        """What a file says beside the tensors as they are trained."""
        return self.spec.scaling * self.spec.rank

    def delta_weight(self) -> Tensor:
        """The update: the shape of the weight, in the adapter's dtype, scaling included."""
        weight = self.base_layer.weight if self.unmerged is None else self.unmerged[0]
        return self.kernel.delta(weight, self.factors(dict(self.tensors())))

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the update to the base's weight; `unmerge` puts back what was there, bit for bit."""
        if self.unmerged is not None:
            return
        weight, bias = self.base_layer.weight, getattr(self.base_layer, "bias", None)
        delta = self.delta_weight()
        self.unmerged = (weight.clone(), None if bias is None else bias.clone())
        weight.copy_(added(weight, delta))
        if self.diff_b is not None and bias is not None:
            bias.copy_(added(bias, self.diff_b))

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.unmerged is None:
            return
        weight, bias = self.unmerged
        self.base_layer.weight.copy_(weight)
        if bias is not None:
            self.base_layer.bias.copy_(bias)
        self.unmerged = None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with its update, in the dtype in which the base layer would answer."""
        if self.unmerged is not None:
            return self.base_layer(x)
        device, weight = x.device.type, self.base_layer.weight
        dtype = autocast_dtype(device)
        if dtype is None or x.dtype == torch.float64:
            # float8 is for storing alone: then it is the input that says what is computed in
            return self._batched(
                shared_cast(x, weight.dtype if weight.dtype.itemsize > 1 else x.dtype)
            )
        with without_autocast(device):
            return self._batched(shared_cast(x, dtype))

    def _batched(self, x: Tensor) -> Tensor:
        if (
            self.op.spatial and x.ndim == self.op.spatial + 1
        ):  # a single image, which convolutions take too
            return self._forward(self.op.padded(x[None]), x.dtype)[0]
        return self._forward(self.op.padded(x), x.dtype)

    def _forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        weight, bias, op = self.base_layer.weight, self.base_layer.bias, self.op
        tensors = self._masked(dict(self.trained()))
        diff_b = tensors.pop("diff_b", None)
        factors = self.factors(tensors)
        mode = self.mode(x, factors)
        dropout = self.spec.options.dropout if self.training else 0.0
        if not dropout:
            y = adapted(self.kernel, mode, x, weight, bias, factors)
        else:
            y, dropped = (
                op(x, weight.to(dtype), None if bias is None else bias.to(dtype)),
                F.dropout(x, dropout),
            )
            if mode == "factors" and isinstance(self.kernel, Additive):
                y = Branch.apply(self.kernel, y, dropped, *factors)
            else:
                y = y + op(dropped, self.kernel.delta(weight, factors).to(dtype))
        return y if diff_b is None else y + op.channel_view(diff_b.to(dtype))

    def mode(self, x: Tensor, factors: Tensors) -> Mode:
        """How this input is computed, as `bypass_mode` asks: true by the factors, false by dW, auto
        the cheaper."""
        wide, by_factors = x.dtype in WIDE, self.kernel.by_factors(factors)
        if self.spec.bypass_mode == "true":
            return "factors" if by_factors else "dense"
        if self.spec.bypass_mode == "false" or not by_factors:
            return "merged" if wide else "dense"
        positions = x.numel() // x.shape[1 if self.op.spatial else -1]
        for step in self.op.stride:
            positions //= step
        return self.kernel.mode(positions, wide, factors)

    def _masked(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` with ranks dropped, or all of them, as `rank_dropout` and `module_dropout` ask.
        Reads no value."""
        options = self.spec.options
        if not self.training or not (options.rank_dropout or options.module_dropout):
            return tensors
        first = tensors[next(name for name in self.rank_axis if name in tensors)]
        keep = torch.rand((), device=first.device) >= options.module_dropout
        masked, masks = {**tensors, **self.constants()}, {}
        for name in (
            name for name in self.rank_axis if name in masked
        ):  # in this order: on every rank the same draws
            tensor, axis = masked[name], self.rank_axis[name]
            ranks = tensor.shape[axis]
            if ranks not in masks:
                masks[ranks] = (
                    torch.rand(ranks, device=tensor.device) >= options.rank_dropout
                ) & keep
            scale = 1.0 if self.multiplicative else 1 / (1 - options.rank_dropout)
            sides = [ranks if i == axis else 1 for i in range(tensor.ndim)]
            masked[name] = tensor * (masks[ranks].view(sides).to(tensor.dtype) * scale)
        if "diff_b" in masked:
            masked["diff_b"] = masked["diff_b"] * keep
        return self.without_update(masked, keep)

    def without_update(self, masked: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        """What else it takes for the update to be zero where `keep` is false."""
        return masked


OF_THE_BASE = {
    "weight",
    "bias",
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
}


class OwnAdapter(Adapter, nn.Module):
    """An adapter whose parameters are registered under their names in a file, `_` for `.`."""

    def __init__(self, base_layer: nn.Module, spec: LayerSpec, shapes: Shapes | None = None):
        super().__init__()
        self.base_layer = base_layer
        weight: Tensor = base_layer.weight  # type: ignore[assignment]
        self.tensor_names = tuple(shapes or self.shapes(spec, weight.shape))
        values = {
            name: torch.empty(
                shape, dtype=torch.float32, device="meta" if weight.is_meta else "cpu"
            )
            for name, shape in (shapes or self.shapes(spec, weight.shape)).items()
        }
        with torch.no_grad():
            self.initialize(values)
        for name, value in values.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(value.to(weight.device)))
        self.setup(base_layer, spec)

    @classmethod
    def on(cls, base_layer: nn.Module, spec: LayerSpec, shapes: Shapes | None = None) -> Adapter:
        return cls(base_layer, spec, shapes)

    @classmethod
    @abstractmethod
    def initialize(cls, tensors: dict[str, Tensor]) -> None:
        """Fills new tensors in place, from torch's global RNG."""

    def tensors(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self, name.replace(".", "_")) for name in self.tensor_names}

    def __getattr__(self, name: str) -> Any:
        """What models and pipelines ask a layer for is the base layer's, as it is with PEFT's
        layers."""
        return getattr(self.base_layer, name) if name in OF_THE_BASE else super().__getattr__(name)


_last_cast: tuple[Any, int, Any] = (lambda: None, 0, lambda: None)


def shared_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; the same tensor for layers that are given the same `x` one after the other (q, k, v), so that
    what they keep for the backward pass is kept once."""
    global _last_cast
    if (
        x.dtype == dtype
        or x.is_inference()
        or torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
    ):
        return x.to(dtype)
    source, version, cast = _last_cast
    found = cast() if source() is x and version == x._version else None
    if found is None or found.dtype != dtype or found.requires_grad != x.requires_grad:
        found = x.to(dtype)
        _last_cast = (weakref.ref(x), x._version, weakref.ref(found))
    return found
