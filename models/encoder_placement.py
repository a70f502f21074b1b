"""Placement of text encoders while they encode, and removal of their parts that are not needed."""

import gc
from typing import Any

import torch
from torch import nn

from models.config import Placement


def place_text_encoders(encoders: Any, placement: Placement, device: torch.device) -> Any:
    """Put the text encoders of a pipeline, which are on the CPU, where they encode; return the
    pipeline.

    `layers`: the weights stay on the CPU, and each layer is copied to the device when it is
    needed."""
    if placement == "cpu":
        return encoders
    if placement == "device":
        return encoders.to(device)
    from accelerate import cpu_offload

    for encoder in text_encoders_of(encoders):
        cpu_offload(encoder, execution_device=device)
    return encoders


def modules_of(pipeline: Any) -> list[nn.Module]:
    """Return the modules of a pipeline."""
    components = pipeline.components.values()
    return [component for component in components if isinstance(component, nn.Module)]


def text_encoders_of(pipeline: Any) -> list[nn.Module]:
    """Return the text encoders of a pipeline."""
    encoders = []
    for name, component in pipeline.components.items():
        if name.startswith("text_encoder") and component is not None:
            encoders.append(component)
    return encoders


def release_text_encoders(encoders: Any) -> None:
    """Take the text encoders out of a pipeline and free their memory."""
    modules = [name for name, part in encoders.components.items() if isinstance(part, nn.Module)]
    for name in modules:
        setattr(encoders, name, None)
    gc.collect()  # the hooks of placement `layers` refer to modules in a circle


def keep_first_layers(text_encoder: Any, last_state: int) -> None:
    """Remove all parts of a language model that its hidden states up to `last_state` do not need.

    These are later layers, the head, and the vision tower of a multimodal model. One layer more
    stays, because the last hidden state is normalized."""
    model = text_encoder.model
    for name in ("vision_tower", "multi_modal_projector"):
        if hasattr(model, name):
            setattr(model, name, None)
    language_model = getattr(model, "language_model", model)
    language_model.layers = language_model.layers[: last_state + 1]
    if hasattr(text_encoder, "lm_head"):
        text_encoder.lm_head = nn.Identity()
