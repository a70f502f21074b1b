"""The assistant LoRA: a frozen LoRA that takes part in training and is not exported.

Training adapters of distilled models are such files: with one, a distilled model behaves as if it were
not distilled. The trained adapter then need not unlearn the distillation, so the base model keeps its
few steps without the assistant.

The update is added to the outputs of layers. The weights of the base model stay as they are: they may
be quantized, exports see only them, and samples without the assistant need no second copy.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter_files import convert
from adapter_files.spellings import LayerSpellings, layer_spellings
from common.errors import AdapterError, ConfigError
from lora_algos.attach import fitted_layers
from lora_algos.layer_op import CONVOLUTIONS, LayerOp
from lora_algos.lora import LoRA
from lora_algos.low_rank import DOWN, UP
from lora_algos.tensors import ALPHA, BIAS, LayerTensors, to_device
from lora_algos.traits import Layers
from models.base import ModelFamily
from models.config import ModelConfig, has_undistilled_name, hub_file_of
from training.adapter_source import AdapterSource, read_source
from training.block_classes import with_forward
from training.config import TrainConfig

FLAG = "--model.assistant_lora"
TEXT_ENCODER_ADVICE = "Expected a LoRA of the denoiser alone. Use another file"
BUFFERS = {DOWN: "assistant_down", UP: "assistant_up"}
"""Tensor in a file -> buffer of a layer."""


class AssistedLayer:
    """Marker of layers with an assistant LoRA."""

    original: type[nn.Module]
    """Class of the layer without the assistant."""
    assistant_op: LayerOp
    assistant_down: Tensor
    assistant_up: Tensor
    """Multiplied by alpha / rank."""
    assistant_strength: float = 1.0


def local_path(path: str, downloads: bool = True) -> str:
    """Return the local path of an assistant LoRA, which is downloaded if it is on the Hub.

    `downloads`: False: only the cache of the Hub is read. Raises ConfigError if there is no file."""
    hub_file = hub_file_of(path)
    if hub_file is None:
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return hf_hub_download(hub_file.repo, hub_file.name, local_files_only=not downloads)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise ConfigError(
            f"{FLAG} {path}: could not be downloaded from the Hub: {reason}. Check the name and "
            "HF_HUB_OFFLINE, or name a local file"
        ) from error


def files_of_assistant(path: str) -> list[Path]:
    """Return the files whose content decides what an assistant LoRA computes."""
    source = Path(local_path(path, downloads=False))
    if not source.is_dir():
        return [source]
    files = []
    for file in sorted(source.iterdir()):
        if file.is_file():
            files.append(file)
    return files


def read_assistant(
    config: ModelConfig, denoiser: nn.Module, names: LayerSpellings, downloads: bool = True
) -> Layers:
    """Return the assistant LoRA of each layer, without a trained adapter on the denoiser.

    Empty without the option. Raises AdapterError naming all tensors that are not a LoRA of this model."""
    path = config.assistant_lora
    if path is None:
        return {}
    try:
        source = read_source(local_path(path, downloads), denoiser, names, TEXT_ENCODER_ADVICE)
        return loras_of(source, denoiser, names)
    except AdapterError as error:
        raise AdapterError(f"{FLAG} {path}: {error}") from error


def empty_assistant(config: ModelConfig, family: ModelFamily) -> Layers:
    """Return the assistant LoRA on meta. WHEN: memory is planned. Nothing is downloaded."""
    if config.assistant_lora is None:
        return {}
    denoiser = family.empty_denoiser()
    names = layer_spellings(family, denoiser)
    layers: Layers = {}
    for name, lora in read_assistant(config, denoiser, names, downloads=False).items():
        layers[name] = to_device(lora, torch.device("meta"))
    return layers


def loras_of(source: AdapterSource, denoiser: nn.Module, names: LayerSpellings) -> Layers:
    """Return the LoRA of each layer. Raises AdapterError naming all tensors that are none."""
    errors = list(source.errors)
    if any(name in names.text_encoders for name in source.layers):
        errors.insert(0, f"it has layers of text encoders. {TEXT_ENCODER_ADVICE}")
    return fitted_layers(denoiser, source.layers, errors, lora_of)


def lora_of(tensors: LayerTensors, layer: Any) -> LayerTensors:
    """Return the two factors of a layer's update, scaled. Raises AdapterError if it is no LoRA."""
    lora = convert.exact_lora(tensors, layer.weight.shape)
    if BIAS in lora:
        raise AdapterError("changes the bias; expected a LoRA of the weight alone")
    if lora.keys() - {ALPHA} != {DOWN, UP}:
        raise AdapterError("is no LoRA of a weight matrix")
    if getattr(layer, "groups", 1) > 1:
        raise AdapterError("is a LoRA of a grouped convolution, which is not supported")
    return {DOWN: lora[DOWN], UP: lora[UP] * LoRA.traits.scaling(lora)}


def attach_assistant(denoiser: nn.Module, loras: Layers) -> None:
    """Let the layers of a denoiser add an assistant LoRA to their output.

    WHEN: after adapters were attached, because the assistant is no part of what they adapt."""
    layers: Mapping[str, Any] = dict(denoiser.named_modules())
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    for name, lora in loras.items():
        layer = layers[name]
        for tensor_name, buffer_name in BUFFERS.items():
            tensor = buffer_of(layer.weight, lora[tensor_name])
            layer.register_buffer(buffer_name, tensor, persistent=False)
        layer.assistant_op = LayerOp.of(getattr(layer, "base_layer", layer))
        cls = type(layer)
        if cls not in classes:
            classes[cls] = with_forward(cls, AssistedLayer, assisted_forward)
        layer.__class__ = classes[cls]


def buffer_of(weight: Tensor, factor: Tensor) -> Tensor:
    """Return a factor in the dtype and on the device of a layer's weight."""
    dtype = weight.dtype
    if dtype.itemsize == 1:  # float8 is only for storage
        dtype = torch.bfloat16
    if factor.is_meta:  # the memory is planned, and no tensor has values
        return torch.empty(factor.shape, dtype=dtype, device=weight.device)
    return factor.to(weight.device, dtype)


def assisted_forward(layer: Any, x: Tensor) -> Tensor:
    """Return the output of a layer with its assistant."""
    y = type(layer).original.forward(layer, x)
    strength = layer.assistant_strength
    if not strength:
        return y
    op = layer.assistant_op
    down = layer.assistant_down.to(y.dtype)
    up = layer.assistant_up.to(y.dtype)
    inputs = x.to(y.dtype)
    hidden = op(op.pad(inputs), down)
    product = F.linear
    if op.spatial_dims:
        product = CONVOLUTIONS[op.spatial_dims - 1]
    update = product(hidden, up)
    return torch.add(y, update, alpha=strength)


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
    is_undistilled = has_undistilled_name(model.path or "")
    if model.assistant_lora is not None or is_undistilled or not family.is_distilled:
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
