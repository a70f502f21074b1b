"""Loading of a denoiser whose weights are quantized one by one: memory never holds all of them
unquantized.

diffusers lets a quantizer replace each weight while it reads a model's files.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from models.quantization import quantizable_layers


class Method(StrEnum):
    """The name of the quantizer in diffusers."""

    BLOCKS = "train-lora-blocks"


class BlockQuantization(QuantizationConfigMixin):
    """The argument of diffusers' from_pretrained that lets a BlockQuantizer load a model."""

    quant_method = Method.BLOCKS  # type: ignore[assignment]

    def __init__(
        self,
        quantized: Callable[[Tensor], Tensor],
        blocks_of: Callable[[nn.Module], dict[str, nn.Module]],
    ):
        """`quantized`: returns a weight in the format. `blocks_of`: returns a model's blocks."""
        self.quantized, self.blocks_of = quantized, blocks_of

    def to_dict(self) -> dict[str, Any]:
        """Return what diffusers puts into requests to the Hub."""
        return {"quant_method": self.quant_method.value}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what diffusers writes into its log."""
        return self.to_dict()


class BlockQuantizer(DiffusersQuantizer):
    """Quantizes the weights of a model's blocks while diffusers loads them."""

    use_keep_in_fp32_modules = True
    is_serializable = False
    is_trainable = False
    quantization_config: BlockQuantization

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        blocks = self.quantization_config.blocks_of(model)
        self.layers = quantizable_layers(blocks)

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        """Return whether a weight is quantized. The arguments have diffusers' names."""
        # diffusers leaves it to quantizers to convert float8
        return is_float8(param_value) or self._is_of_block(param_name)

    def _is_of_block(self, parameter_name: str) -> bool:
        """Return whether a parameter is a weight that gets the format."""
        layer_name, _, name = parameter_name.rpartition(".")
        return name == "weight" and layer_name in self.layers

    def create_quantized_param(  # type: ignore[override]
        self, model: Any, param_value: Tensor, param_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put a weight into its layer, quantized if the layer is in a block."""
        weight = param_value.to(kwargs["dtype"])
        if self._is_of_block(param_name):
            weight = self.quantization_config.quantized(weight)
        layer_name, _, name = param_name.rpartition(".")
        layer = model.get_submodule(layer_name)
        layer._parameters[name] = nn.Parameter(weight, requires_grad=False)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Let the model be a plain one again: its weights act as plain weights."""
        model.is_quantized = False
        model._internal_dict = type(model.config)(
            {name: value for name, value in model.config.items() if name != "quantization_config"}
        )


def is_float8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize == 1


AUTO_QUANTIZER_MAPPING[Method.BLOCKS] = BlockQuantizer
