"""The assistant LoRA: a frozen LoRA that takes part in training and is not exported.

Training adapters of distilled models are such files: with one, a distilled model behaves as if it were
not distilled. The trained adapter then need not unlearn the distillation, so the base model keeps its
few steps without the assistant.

The update is added to the outputs of layers. The weights of the base model stay as they are: they may
be quantized, exports see only them, and samples without the assistant need no second copy.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter_files import convert
from adapter_files.spellings import LayerSpellings
from common.errors import AdapterError, ConfigError, error_list
from lora_algos.layer_op import CONVOLUTIONS, LayerOp
from lora_algos.lora import LoRA
from lora_algos.low_rank import DOWN, UP
from lora_algos.targets import layers_of
from lora_algos.tensors import ALPHA, LayerTensors
from lora_algos.traits import Layers
from models.base import ModelFamily
from models.config import hub_file_of
from training.adapter_source import AdapterSource, read_source
from training.block_classes import with_forward
from training.config import TrainConfig

FLAG = "--model.assistant_lora"
TEXT_ENCODER_ADVICE = "Expected a LoRA of the denoiser alone. Use another file"


class AssistedLayer:
    """Marker of layers with an assistant LoRA."""

    original: type[nn.Module]
    """Class of the layer without the assistant."""
    assistant_op: LayerOp
    assistant_down: Tensor
    assistant_up: Tensor
    """Multiplied by alpha / rank."""
    assistant_strength: float = 1.0


def local_path(path: str) -> str:
    """Return the local path of a file, which is downloaded if it is on the Hub.

    Raises ConfigError if it cannot be."""
    hub_file = hub_file_of(path)
    if hub_file is None:
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return hf_hub_download(hub_file.repo, hub_file.name)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"{FLAG} {path}: could not be downloaded from the Hub: {error}. Check the name, or name a "
            "local file"
        ) from error


def read_assistant(path: str, denoiser: nn.Module, names: LayerSpellings) -> Layers:
    """Return the LoRA of each layer in a file, without a trained adapter on the denoiser.

    Raises AdapterError naming all tensors that are not a LoRA of this model."""
    try:
        source = read_source(local_path(path), denoiser, names, TEXT_ENCODER_ADVICE)
        return loras_of(source, denoiser)
    except AdapterError as error:
        raise AdapterError(f"{FLAG} {path}: {error}") from error


def loras_of(source: AdapterSource, denoiser: nn.Module) -> Layers:
    """Return the LoRA of each layer. Raises AdapterError naming all tensors that are none."""
    errors = list(source.errors)
    modules: dict[str, Any] = dict(layers_of(denoiser))
    loras: Layers = {}
    for name, layer_tensors in source.layers.items():
        try:
            loras[name] = lora_of(layer_tensors, modules[name])
        except AdapterError as error:
            errors.append(f"{name}: {error}")
    if not errors and not loras:
        errors.append("it holds no tensors")
    if errors:
        raise AdapterError(error_list("the file does not fit the model", errors))
    return loras


def lora_of(tensors: LayerTensors, layer: Any) -> LayerTensors:
    """Return the two factors of a layer's update, scaled. Raises AdapterError if it is no LoRA."""
    lora = convert.exact_lora(tensors, layer.weight.shape)
    if lora.keys() - {ALPHA} != {DOWN, UP}:
        raise AdapterError("is no plain LoRA of a weight matrix")
    return {DOWN: lora[DOWN], UP: lora[UP] * LoRA.traits.scaling(lora)}


def attach_assistant(denoiser: nn.Module, loras: Layers) -> None:
    """Let the layers of a denoiser add an assistant LoRA to their output.

    WHEN: after adapters were attached, because the assistant is no part of what they adapt."""
    layers: Mapping[str, Any] = dict(denoiser.named_modules())
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    for name, lora in loras.items():
        layer = layers[name]
        weight = layer.weight
        dtype = weight.dtype if weight.dtype.itemsize > 1 else torch.bfloat16
        for tensor_name, buffer_name in ((DOWN, "assistant_down"), (UP, "assistant_up")):
            tensor = lora[tensor_name].to(weight.device, dtype)
            layer.register_buffer(buffer_name, tensor, persistent=False)
        layer.assistant_op = LayerOp.of(getattr(layer, "base_layer", layer))
        cls = type(layer)
        if cls not in classes:
            classes[cls] = with_forward(cls, AssistedLayer, assisted_forward)
        layer.__class__ = classes[cls]


def assisted_forward(layer: Any, x: Tensor) -> Tensor:
    """Return the output of a layer with its assistant."""
    y = type(layer).original.forward(layer, x)
    strength = layer.assistant_strength
    if not strength:
        return y
    op = layer.assistant_op
    down = layer.assistant_down.to(y.dtype)
    up = layer.assistant_up.to(y.dtype)
    hidden = op(op.pad(x.to(y.dtype)), down)
    if op.spatial_dims:
        update = CONVOLUTIONS[op.spatial_dims - 1](hidden, up)
    else:
        update = F.linear(hidden, up)
    return y + strength * update


@contextmanager
def assistant_at_strength(denoiser: nn.Module, strength: float) -> Iterator[None]:
    """Multiply the assistant's update by a factor in a block; 0 leaves it out."""
    layers: list[Any] = [
        module for module in denoiser.modules() if isinstance(module, AssistedLayer)
    ]
    for layer in layers:
        layer.assistant_strength = strength
    try:
        yield
    finally:
        for layer in layers:
            layer.assistant_strength = 1.0


def distillation_notes(config: TrainConfig, family: ModelFamily) -> list[str]:
    """Return a note about training on a distilled model without an assistant LoRA."""
    model = config.model
    if model.assistant_lora is not None or not family.is_distilled:
        return []
    advice = "Name a training adapter with --model.assistant_lora"
    if family.undistilled_model:
        advice = (
            f"Better train on {family.undistilled_model}, or name a training adapter with "
            "--model.assistant_lora"
        )
    return [
        f"note: {model.path} was distilled to few denoising steps, and training undoes this little by "
        f"little: samples with few steps become worse. {advice}"
    ]
