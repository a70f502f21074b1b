"""The memory of encoding captions and images, traced with tensors that have no values."""

from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import nn

from data.precompute.encode import media_batch_size
from models.diffusers_family import DiffusersFamily
from models.empty_components import empty_encoders
from models.encoder_placement import modules_of, text_encoders_of
from models.quantized_weight import stored_parts
from training.config import TrainConfig
from training.memory.live_bytes import LiveBytes
from training.memory.phase_memory import CAPTIONS, ENCODERS, IMAGES, VAE, PhaseMemory
from training.memory.sample_shape import SampleShape


def trace_captions(config: TrainConfig, family: DiffusersFamily, unit: int) -> PhaseMemory:
    """Return the memory of encoding captions. `unit`: see LiveBytes."""
    placement = config.model.text_encoder_placement
    if placement == "cpu":
        return PhaseMemory(CAPTIONS, {})
    batch_size = config.data.encode_batch_size
    if family.controls.is_seen_by_text_encoder:
        batch_size = 1  # images of other captions have other sizes
    encoders = text_encoders_of(empty_encoders(family, "text"))
    live_bytes = LiveBytes(unit)
    label_modules(live_bytes, encoders, ENCODERS)
    with live_bytes:
        for encoder in filter(takes_tokens, encoders):
            encode_tokens(encoder, family.max_tokens, batch_size)
    num_bytes = dict(live_bytes.at_peak)
    if placement == "layers":
        num_bytes[ENCODERS] = largest_layer(encoders)
    return PhaseMemory(CAPTIONS, num_bytes)


def takes_tokens(encoder: nn.Module) -> bool:
    """Return whether an encoder takes tokens. One that takes the states of another is small: its weights
    alone are counted."""
    return "attention_mask" in signature(encoder.forward).parameters


@torch.no_grad()
def encode_tokens(encoder: Any, max_tokens: int, batch_size: int) -> None:
    """Run a text encoder on the longest captions."""
    config = getattr(encoder.config, "text_config", encoder.config)
    positions = getattr(config, "max_position_embeddings", max_tokens)
    num_tokens = min(max_tokens, positions)
    tokens = torch.zeros(batch_size, num_tokens, dtype=torch.int64)
    mask = torch.ones_like(tokens)
    has_states = not type(encoder).__name__.endswith("T5EncoderModel")
    encoder(tokens, attention_mask=mask, output_hidden_states=has_states)


def trace_images(
    config: TrainConfig, family: DiffusersFamily, sample: SampleShape, unit: int
) -> PhaseMemory:
    """Return the memory of encoding images or videos. `unit`: see LiveBytes."""
    encoders = empty_encoders(family, "media")
    live_bytes = LiveBytes(unit)
    label_modules(live_bytes, modules_of(encoders), VAE)
    batch_size = media_batch_size(config.data, sample.pixels)
    with torch.no_grad(), live_bytes:
        pixels = torch.empty(batch_size, *sample.pixels)
        family.encode_media(encoders, pixels)
    return PhaseMemory(IMAGES, live_bytes.at_peak)


def label_modules(live_bytes: LiveBytes, modules: list[nn.Module], category: str) -> None:
    """Put the weights of modules into a category."""
    for module in modules:
        live_bytes.label(module.parameters(), category)
        live_bytes.label(module.buffers(), category)


def largest_layer(modules: list[nn.Module]) -> int:
    """Return the bytes of the largest layer in modules."""
    largest = 0
    for module in modules:
        for layer in module.modules():
            parameters = layer.parameters(recurse=False)
            tensors = chain.from_iterable(map(stored_parts, parameters))
            num_bytes = sum(tensor.nbytes for tensor in tensors)
            largest = max(largest, num_bytes)
    return largest
