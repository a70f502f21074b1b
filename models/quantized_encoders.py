"""Text encoders with quantized weights: the layers that are quantized, and loading by transformers,
which quantizes each weight when it was read."""

from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from models.block_format import BlockFormat
from models.config import Quantization
from models.quantization import is_encoder_weight, quantize_layers

METHOD = "train-lora-encoder"
"""The name of the quantizer in transformers."""


def quantize_encoder(encoder: nn.Module, quantization: Quantization) -> None:
    """Quantize the layers of a text encoder.

    `encoder`: with values, or without for a plan of memory."""
    layers = []
    for name, layer in encoder.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if is_encoder_weight(f"{name}.weight", layer.weight):
            layers.append(layer)
    quantize_layers(layers, quantization)


@register_quantization_config(METHOD)
class EncoderQuantization(QuantizationConfigMixin):
    """The argument of transformers' from_pretrained that lets an EncoderQuantizer load a model."""

    def __init__(self, layers: BlockFormat):
        """`layers`: the format of the weights in the encoder's layers."""
        self.quant_method = METHOD  # type: ignore[assignment]
        self.layers = layers


@register_quantizer(METHOD)
class EncoderQuantizer(HfQuantizer):
    """Quantizes the weights of a text encoder while transformers loads them."""

    requires_calibration = False
    quantization_config: EncoderQuantization

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Return whether a parameter gets the format. The arguments have transformers' names."""
        return is_encoder_weight(param_name, model.get_parameter(param_name))

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    def get_quantize_ops(self) -> "QuantizeWeight":
        """Return the operation on each of these parameters."""
        return QuantizeWeight(self.quantization_config.layers)

    def postprocess_model(self, model: Any, **_: Any) -> None:
        """Let the model be a plain one again: its weights act as plain weights."""
        self.remove_quantization_config(model)


class QuantizeWeight(ConversionOps):
    """Turns a weight that was read into one in the format."""

    def __init__(self, layers: BlockFormat):
        self.layers = layers

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *_: Any, **__: Any
    ) -> dict[str, Tensor]:
        """Return the weights. The argument has transformers' name."""
        weights: dict[str, Tensor] = {}
        for name, tensors in input_dict.items():
            tensor = tensors
            if isinstance(tensors, list):
                (tensor,) = tensors
            weight = self.layers.quantized(tensor)
            weights[name] = nn.Parameter(weight, requires_grad=False)
        return weights
