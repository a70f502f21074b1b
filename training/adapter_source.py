"""Adapter files that a run starts from: their tensors by layer of the base model."""

from typing import NamedTuple

from torch import nn

from adapter_files import files
from adapter_files.reader import import_layers
from adapter_files.spellings import LayerSpellings
from common.errors import AdapterError
from lora_algos.traits import Layers

TEXT_ENCODER_PREFIXES = ("lora_te", "text_encoder")
"""First part of the keys of text encoders in adapter files."""
MAX_SHOWN_KEYS = 3
"""Keys of a file that is not an adapter, which its error shows."""


class AdapterSource(NamedTuple):
    """The content of an adapter file."""

    layers: Layers
    errors: list[str]
    """Errors of tensors that do not fit the model."""
    metadata: dict[str, str]


def read_source(
    path: str, denoiser: nn.Module, names: LayerSpellings, text_encoder_advice: str
) -> AdapterSource:
    """Return the content of an adapter file for a denoiser.

    `text_encoder_advice`: what to do about layers of text encoders that are not adapted. Raises
    AdapterError, whose message is without the flag, for a file that is no adapter of the model."""
    try:
        tensors, metadata = files.read_adapter(path)
    except AdapterError as error:
        raise AdapterError(f"is not readable: {error}") from error
    layers, errors = import_layers(tensors, metadata, denoiser, names)
    has_text_encoders = any(key.startswith(TEXT_ENCODER_PREFIXES) for key in tensors)
    if not layers and not has_text_encoders:
        keys = ", ".join(sorted(tensors)[:MAX_SHOWN_KEYS])
        raise AdapterError(
            f"is not an adapter of this model: no key belongs to a layer ({keys}, ...)"
        )
    if has_text_encoders and not names.text_encoders:
        errors.insert(0, f"it has layers of text encoders. {text_encoder_advice}")
    return AdapterSource(layers, errors, metadata)
