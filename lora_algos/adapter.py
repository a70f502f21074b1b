"""Adapted layers: a module that replaces the layer it adapts and keeps it as `base_layer`.

DDP, FSDP and `state_dict` see the module, and nothing else of the model changes. Its parameters are
fp32 for every dtype of the base. At first the update is exactly zero.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.precision import autocast_dtype, without_autocast
from lora_algos.algorithm import Algorithm
from lora_algos.autograd_functions import (
    AdaptedFunction,
    AdditiveFunction,
    choose_mode,
    merged_or_dense_forward,
    values_of,
)
from lora_algos.config import BypassMode, LayerSpec
from lora_algos.dropout import drop_ranks
from lora_algos.frozen_weight import (
    frozen_weight,
    stored_tensors,
    stored_weight,
    weight_values,
    write_frozen_weight,
)
from lora_algos.input_cast import shared_cast
from lora_algos.kernels import AdditiveKernel, Factors, Kernel, Mode, Prepared
from lora_algos.layer_op import LayerOp, add_update
from lora_algos.prepared import PreparedFactors, prepare
from lora_algos.tensors import ALPHA, BIAS, LayerTensors, Shapes


class AdapterLayer(ABC):
    """An adapted layer. Its tensors have the names that they have in a file.

    A mixin, so that PEFT's layers can be adapters too; it is the first of the base classes."""

    base_layer: Any
    algorithm: Algorithm
    spec: LayerSpec
    op: LayerOp
    kernel: Kernel
    _modules: dict[str, Any]
    constant_names: tuple[str, ...]
    """Buffers that follow from the values of the base weight."""
    diff_b: nn.Parameter | None
    """Change of the bias, if it is trained."""
    prepared: PreparedFactors
    modes: dict[tuple[BypassMode, torch.Size, torch.dtype], Mode]
    """Chosen mode of each option, and shape and dtype of an input."""
    unmerged: tuple[Tensor, Tensor | None] | None
    """Weight and bias of the base while the update is merged into it."""
    training: bool
    strength: float = 1.0
    """Factor on the update in the forward pass, as programs have it that load the adapter. An attribute
    and no hook, because compiled blocks do not see hooks that are added later."""

    @abstractmethod
    def update_tensors(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors of the weight's update, in the order of `Algorithm.shapes`."""

    def setup(
        self,
        base_layer: Any,
        algorithm: Algorithm,
        spec: LayerSpec,
    ) -> None:
        """Finish construction. WHEN: `base_layer` and the tensors are registered."""
        shape, bias = base_layer.weight.shape, getattr(base_layer, "bias", None)
        tensors: Any = self.update_tensors()
        self.algorithm, self.spec = algorithm, spec
        self.op = LayerOp.of(base_layer)
        self.kernel = algorithm.make_kernel(self.op, spec, shape, tensors)
        self.prepared, self.modes = PreparedFactors(), {}
        self.unmerged = None
        self.diff_b = None
        if spec.bias and bias is not None:
            self.diff_b = nn.Parameter(torch.zeros_like(bias, dtype=torch.float32))
        self.register_load_state_dict_post_hook(forget_prepared)  # type: ignore[attr-defined]
        constants = algorithm.weight_constants(frozen_weight(base_layer).detach())
        self.constant_names = tuple(constants)
        for name, constant in constants.items():
            self.register_buffer(name, constant, persistent=False)  # type: ignore[attr-defined]
        if constants:
            self.register_load_state_dict_post_hook(update_constants)  # type: ignore[attr-defined]
            with torch.no_grad():
                algorithm.initialize_from_constants(tensors, constants)

    def trained_tensors(self) -> dict[str, nn.Parameter]:
        """Return all trained tensors of the layer."""
        tensors = self.update_tensors()
        if self.diff_b is not None:
            tensors[BIAS] = self.diff_b
        return tensors

    def constants(self) -> LayerTensors:
        """Return tensors that are not trained and that a checkpoint must hold."""
        return {}

    def weight_constants(self) -> LayerTensors:
        """Return tensors that follow from the values of the base weight."""
        return {name: getattr(self, name) for name in self.constant_names}

    def file_tensors(self) -> LayerTensors:
        """Return the layer's tensors for a file, in which scaling is alpha / rank.

        The alpha is in fp64."""
        tensors: LayerTensors = {}
        for name, tensor in self.trained_tensors().items():
            tensors[name] = tensor.detach()
        alpha = self.algorithm.checkpoint_alpha(self.spec)
        tensors[ALPHA] = torch.tensor(alpha, dtype=torch.float64)
        return self.algorithm.traits.files.portable(tensors)

    def describe(self) -> str:
        """Return the algorithm, its size and its scaling, as an equation."""
        spec, algorithm = self.spec, self.algorithm
        divisor, rank = "rank", f"{spec.rank}"
        if spec.options.rslora:
            divisor, rank = "sqrt(rank)", f"sqrt({spec.rank})"
        scaling = f"scaling = alpha / {divisor} = {spec.alpha:g} / {rank} = {spec.scaling:g}"
        shapes: Shapes = {}
        for name, tensor in self.update_tensors().items():
            shapes[name] = tuple(tensor.shape)
        text = f"{algorithm.name}, {algorithm.describe_size(spec, shapes, scaling)}"
        if spec.lr_scale != 1:
            text += f", learning rate x {spec.lr_scale:g}"
        return text

    def factors(self, tensors: LayerTensors) -> Factors:
        """Return the kernel's factors, from the trained tensors or their masked forms."""
        all_tensors = {**self.constants(), **tensors, **self.weight_constants()}
        return self.algorithm.factors(all_tensors, self.spec)

    def base_weight(self) -> Tensor:
        """Return the weight of the base, also while the update is merged into it."""
        if self.unmerged is None:
            return frozen_weight(self.base_layer)
        return weight_values(self.unmerged[0])

    def delta_weight(self) -> Tensor:
        """Return the update: the shape of the weight, scaled, in the adapter's dtype."""
        return self.kernel.delta(self.base_weight(), self.factors(dict(self.update_tensors())))

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight of the base, until `unmerge`.

        For users of the library: this program merges into copies (AdaptedModel.merge_into)."""
        if self.unmerged is not None:
            return
        stored, bias = stored_weight(self.base_layer), getattr(self.base_layer, "bias", None)
        delta = self.delta_weight()
        self.unmerged = (stored.clone(), None if bias is None else bias.clone())
        write_frozen_weight(self.base_layer, add_update(weight_values(stored), delta))
        if self.diff_b is not None and bias is not None:
            bias.copy_(add_update(bias, self.diff_b))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weight and bias of the base, bit for bit."""
        if self.unmerged is None:
            return
        weight, bias = self.unmerged
        stored_weight(self.base_layer).copy_(weight)
        if bias is not None:
            self.base_layer.bias.copy_(bias)
        self.unmerged = None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Apply a function to all tensors, such as one that moves them to another device."""
        self.prepared.clear()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with its update, in the dtype that the base layer returns."""
        if self.strength == 1.0:
            return self._adapted_forward(x)
        base_output = self.base_layer(x)
        output = self._adapted_forward(x)
        return torch.lerp(base_output, output, self.strength)

    def _adapted_forward(self, x: Tensor) -> Tensor:
        """Return the output with the whole update."""
        if self.unmerged is not None:
            return self.base_layer(x)
        device = x.device.type
        dtype = autocast_dtype(device)
        if dtype is None or x.dtype == torch.float64:
            dtype = self.base_layer.weight.dtype
            if dtype.itemsize == 1:  # float8 is only for storage
                dtype = x.dtype
            return self._forward(shared_cast(x, dtype))
        if torch.compiler.is_compiling():
            with without_autocast(device):
                return self._forward(shared_cast(x, dtype))
        torch.set_autocast_enabled(device, False)  # a context manager takes five times as long
        try:
            return self._forward(shared_cast(x, dtype))
        finally:
            torch.set_autocast_enabled(device, True)

    def _forward(self, x: Tensor) -> Tensor:
        """Return the output for an input in the dtype that is computed in."""
        op = self.op
        is_single_image = op.spatial_dims and x.ndim == op.spatial_dims + 1
        if is_single_image:
            x = x[None]
        if op.extra_padding:
            x = op.pad(x)
        diff_b: Tensor | None = self.diff_b
        if self.training and self.spec.options.has_dropout:
            tensors = self.masked_tensors({**self.trained_tensors()})
            diff_b = tensors.pop(BIAS, None)
            y = self._forward_with_dropout(x, self.factors(tensors))
        else:
            y = self._forward_with_factors(x)
        if diff_b is not None:
            y = y + op.channel_view(diff_b.to(x.dtype))
        return y[0] if is_single_image else y

    def _forward_with_factors(self, x: Tensor) -> Tensor:
        """Return the output of an update without dropout and without a change of the bias."""
        if torch.compiler.is_compiling():
            return self._compiled_forward(x)
        kept = self.prepared
        factors = kept.factors
        prepared = kept.values
        if not kept.is_current(x.dtype):
            factors = self.factors({**self.update_tensors()})
            prepared = ()
        mode = self.mode(x, factors)
        if mode == "factors" and not prepared:
            prepared = self._kept_values(factors, x.dtype)
        return self._apply_kernel(x, mode, factors, prepared)

    def _apply_kernel(
        self,
        x: Tensor,
        mode: Mode,
        factors: Factors,
        prepared: Prepared,
    ) -> Tensor:
        base = stored_tensors(self._modules["base_layer"])  # faster than the attribute
        return AdaptedFunction.apply(self.kernel, mode, x, base, prepared, *factors)

    def _kept_values(self, factors: Factors, dtype: torch.dtype) -> Prepared:
        """Return what the passes compute with, if it is kept between them; else nothing."""
        kept = self.prepared
        # tensors of inference mode have no version
        if kept.group is None or torch.is_inference_mode_enabled():
            return ()
        kept.group.prepare_after_update(dtype)
        if not kept.is_current(dtype):
            parameter_factors = self.parameter_factors()
            if parameter_factors is None:
                return ()
            weight = frozen_weight(self.base_layer)
            values = prepare(self.kernel, weight, factors, dtype)
            kept.put(parameter_factors, values, dtype)
        return kept.values

    def parameter_factors(self) -> Factors | None:
        """Return the factors if they are the trained tensors and constants of the weight."""
        tensors: LayerTensors = {**self.update_tensors()}
        factors = self.factors(tensors)
        constants = self.weight_constants()
        sources = [*tensors.values(), *constants.values()]
        source_ids = {id(source) for source in sources}
        for factor in factors:
            if id(factor) not in source_ids:
                return None
        return factors

    def _compiled_forward(self, x: Tensor) -> Tensor:
        """Return the output by operations that torch.compile plans."""
        kernel = self.kernel
        factors = self.factors({**self.update_tensors()})
        mode = choose_mode(kernel, self.spec.bypass_mode, x, factors)
        if mode == "factors":
            return self._apply_kernel(x, mode, factors, ())
        base = stored_tensors(self.base_layer)
        weight, bias = values_of(base, x.dtype)
        return merged_or_dense_forward(kernel, mode, x, weight, bias, factors)

    def mode(self, x: Tensor, factors: Factors) -> Mode:
        """Return the mode for an input with its padding."""
        key = (self.spec.bypass_mode, x.shape, x.dtype)
        mode = self.modes.get(key)
        if mode is None:
            mode = choose_mode(self.kernel, self.spec.bypass_mode, x, factors)
            self.modes[key] = mode
        return mode

    def _forward_with_dropout(self, x: Tensor, factors: Factors) -> Tensor:
        """Return the output of an update whose factors or input have dropped elements.

        The input of the base has all elements."""
        kernel, op = self.kernel, self.op
        mode = choose_mode(kernel, self.spec.bypass_mode, x, factors)
        if not self.spec.options.dropout:
            return self._apply_kernel(x, mode, factors, ())
        base = stored_tensors(self.base_layer)
        y = op(x, *values_of(base, x.dtype))
        dropped_x = F.dropout(x, self.spec.options.dropout)
        if mode == "factors" and isinstance(kernel, AdditiveKernel):
            return AdditiveFunction.apply(kernel, y, dropped_x, *factors)
        delta = kernel.delta(weight_values(base[0]), factors)
        return y + op(dropped_x, delta.to(x.dtype))

    def masked_tensors(self, tensors: LayerTensors) -> LayerTensors:
        """Return the tensors with dropped ranks, as `rank_dropout` and `module_dropout` say."""
        options = self.spec.options
        has_masks = options.rank_dropout or options.module_dropout
        if not self.training or not has_masks:
            return tensors
        all_tensors = {**tensors, **self.constants()}
        masked_tensors, is_kept = drop_ranks(self.algorithm.traits, all_tensors, options)
        constants = self.weight_constants()
        return self.algorithm.without_update(masked_tensors, constants, is_kept)


def forget_prepared(layer: AdapterLayer, _: Any) -> None:
    """Forget what a layer has prepared. WHEN: a state dict was loaded, maybe as new tensors."""
    layer.prepared.clear()


def update_constants(layer: AdapterLayer, _: Any) -> None:
    """Compute the constants of the weight again.

    WHEN: a state dict was loaded, which may be that of another base."""
    weight = frozen_weight(layer.base_layer).detach()
    constants = layer.algorithm.weight_constants(weight)
    for name, constant in constants.items():
        gather = getattr(constant, "full_tensor", None)  # the weight is sharded by FSDP
        setattr(layer, name, gather() if gather else constant)
