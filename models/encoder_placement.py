"""Placement of text encoders while they encode, and removal of their parts that are not needed."""

import gc
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn

from models.config import Placement

TEXT_ENCODERS = ("text_encoder", "text_conditioner")
"""Beginnings of the names of components that compute the embeddings of a caption."""


def place_text_encoders(encoders: Any, placement: Placement, device: torch.device) -> Any:
    """Put the text encoders of a pipeline, which are on the CPU, where they encode; return the
    pipeline.

    `layers`: the weights stay on the CPU, and each layer is copied to the device when it is
    needed."""
    if placement == "cpu":
        return encoders
    if placement == "device":
        return encoders.to(device)
    for encoder in text_encoders_of(encoders):
        for module in encoder.modules():
            if module is encoder or has_own_tensors(module):
                add_hook_to_module(module, CopyToDevice(device))
    return encoders


def let_name_device(encoder: Any) -> None:
    """Let an encoder name the device on which its layers compute, not the one that has the weights.

    Some pipelines call the layers themselves, and put their inputs there. The encoder's own call may
    not return hidden states any more, because transformers looks for its class."""
    encoder_class = type(encoder)

    def device(module: Any) -> torch.device:
        hook = getattr(module, "_hf_hook", None)
        return next(module.parameters()).device if hook is None else hook.execution_device

    members = {"device": property(device)}
    encoder.__class__ = type(encoder_class.__name__, (encoder_class,), members)


def has_own_tensors(module: nn.Module) -> bool:
    """Return whether a module has parameters or buffers besides those of its children."""
    return bool(module._parameters or module._buffers)


class CopyToDevice(ModelHook):
    """Copies a module's own parameters and buffers to a device while the module computes.

    accelerate.cpu_offload does the same, but cannot copy quantized weights."""

    def __init__(self, device: torch.device):
        self.execution_device = device
        """Pipelines of diffusers look for it."""
        self.host_parameters: dict[str, Any] = {}
        self.host_buffers: dict[str, Any] = {}

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        self.host_parameters = dict(module._parameters)
        self.host_buffers = dict(module._buffers)
        for name, parameter in self.host_parameters.items():
            if parameter is not None:
                copy = parameter.detach().to(self.execution_device)
                module._parameters[name] = nn.Parameter(copy, requires_grad=False)
        for name, buffer in self.host_buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(self.execution_device)
        return (
            send_to_device(args, self.execution_device),
            send_to_device(kwargs, self.execution_device),
        )

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        module._parameters.update(self.host_parameters)
        module._buffers.update(self.host_buffers)
        return output


def modules_of(pipeline: Any) -> list[nn.Module]:
    """Return the modules of a pipeline."""
    components = pipeline.components.values()
    return [component for component in components if isinstance(component, nn.Module)]


def text_encoders_of(pipeline: Any) -> list[nn.Module]:
    """Return the text encoders of a pipeline."""
    encoders = []
    for name, component in pipeline.components.items():
        if name.startswith(TEXT_ENCODERS) and component is not None:
            encoders.append(component)
    return encoders


def release_text_encoders(encoders: Any) -> None:
    """Take the text encoders out of a pipeline and free their memory."""
    modules = [name for name, part in encoders.components.items() if isinstance(part, nn.Module)]
    for name in modules:
        setattr(encoders, name, None)
    gc.collect()  # the hooks of placement `layers` refer to modules in a circle


def keep_first_layers(text_encoder: Any, last_state: int, has_images: bool = False) -> None:
    """Remove all parts of a language model that its hidden states up to `last_state` do not need.

    These are later layers, the head, and the vision tower of a multimodal model, unless `has_images`:
    it is given images. One layer more stays, because the last hidden state is normalized."""
    model = getattr(text_encoder, "model", text_encoder)  # with and without a head
    for name in ("vision_tower", "multi_modal_projector", "visual"):
        if hasattr(model, name) and not has_images:
            setattr(model, name, None)
    language_model = getattr(model, "language_model", model)
    language_model.layers = language_model.layers[: last_state + 1]
    if hasattr(text_encoder, "lm_head"):
        text_encoder.lm_head = nn.Identity()
