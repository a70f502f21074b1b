"""Text encoders in separate files, as in ComfyUI's `text_encoders/`.

A file is assigned to the text encoder of a model that its tensors fit, and loaded by transformers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from common.errors import ModelError, error_list
from models.checkpoint_files import (
    Shapes,
    tensor_shapes,
)
from models.quiet import hide_load_report
from models.stored_formats import check_formats

if TYPE_CHECKING:
    import torch
    from torch import nn

    from models.block_format import BlockFormat

MIN_KNOWN_TOKENS = 0.9
"""Smallest share of a text encoder's tokens that its tokenizer must know."""
MAX_NAMED_TENSORS = 5
LANGUAGE_MODEL = r"(?:model\.|language_model\.)*"


@dataclass(frozen=True)
class Architecture:
    """An architecture of text encoders, recognized by the names of its tensors."""

    name: str
    token_table: str
    """Regular expression for the name of the table of tokens."""
    layer: str
    """Regular expression for the names in numbered layers; the group is the number."""


CLIP = Architecture(
    "CLIP",
    r"(?:text_model\.)?embeddings\.token_embedding\.weight",
    r"(?:text_model\.)?encoder\.layers\.(\d+)\..*",
)
T5 = Architecture("T5", r"shared\.weight", r"encoder\.block\.(\d+)\..*")
LLM = Architecture(
    "language model",
    rf"{LANGUAGE_MODEL}embed_tokens\.weight",
    rf"{LANGUAGE_MODEL}layers\.(\d+)\..*",
)
ARCHITECTURES = (CLIP, T5, LLM)
MODEL_TYPES = {"clip_text_model": CLIP, "t5": T5, "umt5": T5}
"""transformers' model_type -> architecture; LLM for all other types."""
UNREAD_TENSORS = re.compile(r"(.*\.)?(lm_head|visual|vision_tower|multi_modal_projector)\..*")
"""Tensors of an encoder that captions do not need, so that a file may lack them."""


@dataclass(frozen=True)
class Signature:
    """Facts by which a text encoder is recognized in a file."""

    architecture: str
    num_tokens: int
    width: int
    num_layers: int

    def __str__(self) -> str:
        return (
            f"{self.architecture} of {self.num_tokens} tokens x {self.width}, "
            f"{self.num_layers} layers"
        )

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "Signature":
        """Return the signature of an encoder with this transformers config. Raises KeyError."""
        text_config = {**config, **config.get("text_config", {})}
        width = text_config["d_model" if "d_model" in text_config else "hidden_size"]
        layers = text_config["num_layers" if "num_layers" in text_config else "num_hidden_layers"]
        architecture = MODEL_TYPES.get(config["model_type"], LLM)
        return cls(architecture.name, text_config["vocab_size"], width, layers)

    @classmethod
    def of_shapes(cls, shapes: Shapes) -> "Signature | None":
        """Return the signature of the encoder in a file with such tensors, if there is one."""
        for architecture in ARCHITECTURES:
            table_shape = None
            layers = set()
            for name, shape in shapes.items():
                if re.fullmatch(architecture.token_table, name) and len(shape) == 2:
                    table_shape = table_shape or shape
                match = re.fullmatch(architecture.layer, name)
                if match:
                    layers.add(match[1])
            if table_shape and layers:
                num_tokens, width = table_shape
                return cls(architecture.name, num_tokens, width, len(layers))
        return None


@dataclass(frozen=True)
class FileMatch:
    """The text encoders that a file may be, or the error if it is no text encoder."""

    encoders: list[str]
    error: str


def match_file(path: str, signatures: Mapping[str, Signature]) -> FileMatch:
    """Find the text encoders with the signature of a file."""
    try:
        shapes = tensor_shapes(Path(path))
        check_formats(Path(path))
    except ModelError as error:
        return FileMatch([], str(error).removeprefix(f"{path}: "))
    except (SafetensorError, OSError) as error:
        return FileMatch([], f"is not a readable .safetensors file: {error}")
    signature = Signature.of_shapes(shapes)
    encoders = [name for name in signatures if signatures[name] == signature]
    description = str(signature)
    if signature is None:
        first_name = min(shapes, default="none")
        description = f"not a text encoder: it has {len(shapes)} tensors, named like {first_name}"
    expected = [f"{name} ({signature})" for name, signature in signatures.items()]
    expectation = " or ".join(expected) or "no file, because this model has no text encoder"
    return FileMatch(encoders, f"is {description}; expected {expectation}")


def assign_files(files: tuple[str, ...], signatures: Mapping[str, Signature]) -> dict[str, Path]:
    """Assign each file to a text encoder; encoders with the same signature get files in order.

    Raises ModelError with the errors of all files."""
    assigned: dict[str, Path] = {}
    errors = []
    for file in files:
        match = match_file(file, signatures)
        free_encoders = [name for name in match.encoders if name not in assigned]
        if free_encoders:
            assigned[free_encoders[0]] = Path(file)
        elif match.encoders:
            encoder = match.encoders[0]
            errors.append(
                f"{file}: is {encoder}, like {assigned[encoder]}. Use one file for each encoder"
            )
        else:
            errors.append(f"{file}: {match.error}")
    if errors:
        raise ModelError(error_list("--model.text_encoders", errors))
    return assigned


def load_encoder(
    file: Path, class_name: str, config_folder: Path, dtype: "torch.dtype", layers: "BlockFormat"
) -> "nn.Module":
    """Load a transformers encoder of this class and configuration, with the weights of a file.

    `layers`: the format of the weights in its layers. Raises ModelError if weights are missing."""
    import transformers

    from models.layer_loading import read_encoder

    encoder_class = getattr(transformers, class_name)
    config = encoder_class.config_class.from_pretrained(config_folder)
    tensors = read_encoder(file, dtype, layers)
    if "text_projection" in tensors:  # as ComfyUI's older CLIPSave wrote it
        tensors["text_projection.weight"] = tensors.pop("text_projection").T
    if hasattr(config, "text_config") and not any("language_model." in name for name in tensors):
        tensors = {
            re.sub(r"^model\.(?!visual)", "model.language_model.", name): tensor
            for name, tensor in tensors.items()
        }
    with hide_load_report():
        encoder, report = encoder_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    missing_keys = sorted(
        name for name in report["missing_keys"] if not UNREAD_TENSORS.fullmatch(name)
    )
    if missing_keys:
        raise ModelError(
            f"--model.text_encoders {file}: lacks {len(missing_keys)} tensors of {class_name}: "
            f"{', '.join(missing_keys[:MAX_NAMED_TENSORS])}. Use a complete file"
        )
    return encoder


def check_tokenizer(path: str | None, tokenizer: Any, encoder: Any) -> None:
    """Raise ModelError if a tokenizer knows too few of its text encoder's tokens.

    transformers makes an empty tokenizer if its files are missing. The encoder's table may be
    larger than the vocabulary, because its size is rounded up. Either argument may be None."""
    if tokenizer is None or encoder is None:
        return
    config = getattr(encoder.config, "text_config", encoder.config)
    num_known = len(getattr(tokenizer, "tokenizer", tokenizer))
    if num_known < MIN_KNOWN_TOKENS * config.vocab_size:
        raise ModelError(
            f"--model.path {path}: has an incomplete tokenizer: it knows {num_known} tokens, the "
            f"text encoder {config.vocab_size}. Use a folder with all files of the tokenizer"
        )
