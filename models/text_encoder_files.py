"""Text encoders in files of their own, as ComfyUI's `text_encoders/` has them: which encoder of a
family a file is, and how transformers loads it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from common.errors import ModelError
from models.checkpoint_files import SCALES, shapes_of
from models.quiet import unreported

if TYPE_CHECKING:
    import torch
    from torch import nn

LANGUAGE_MODEL = r"(?:model\.|language_model\.)*"
# kind -> names of its table of tokens, and of what is in its layers, which are numbered
KINDS = {
    "CLIP": (
        r"(?:text_model\.)?embeddings\.token_embedding\.weight",
        r"(?:text_model\.)?encoder\.layers\.(\d+)\..*",
    ),
    "T5": (r"shared\.weight", r"encoder\.block\.(\d+)\..*"),
    "language model": (
        rf"{LANGUAGE_MODEL}embed_tokens\.weight",
        rf"{LANGUAGE_MODEL}layers\.(\d+)\..*",
    ),
}
# of transformers' model_type; all others are the last kind
KIND_OF = {"clip_text_model": "CLIP", "t5": "T5", "umt5": "T5"}
UNREAD = re.compile(
    r"(.*\.)?(lm_head|visual|vision_tower|multi_modal_projector)\..*"
)  # by captions


@dataclass(frozen=True)
class Signature:
    """What an encoder is recognized by."""

    kind: str
    tokens: int
    width: int
    layers: int

    def __str__(self) -> str:
        return f"{self.kind} of {self.tokens} tokens x {self.width}, {self.layers} layers"


def wanted(config: Mapping[str, Any]) -> Signature:
    """Of an encoder with that config of transformers. Raises KeyError."""
    text = {**config, **config.get("text_config", {})}
    width = text["d_model"] if "d_model" in text else text["hidden_size"]
    layers = text["num_layers"] if "num_layers" in text else text["num_hidden_layers"]
    return Signature(
        KIND_OF.get(config["model_type"], "language model"), text["vocab_size"], width, layers
    )


def found(shapes: Mapping[str, tuple[int, ...]]) -> Signature | None:
    """Of a file with such tensors; None if it is no text encoder."""
    for kind, (table, layer) in KINDS.items():
        tables = [
            shape for name, shape in shapes.items() if re.fullmatch(table, name) and len(shape) == 2
        ]
        layers = {match[1] for name in shapes if (match := re.fullmatch(layer, name))}
        if tables and layers:
            return Signature(kind, *tables[0], len(layers))
    return None


def file_fault(path: str, encoders: Mapping[str, Signature]) -> tuple[list[str], str]:
    """Those of the encoders that the file can be; or none, and why."""
    try:
        shapes = shapes_of(Path(path))
    except (SafetensorError, OSError) as error:
        return [], f"not a readable .safetensors file: {error}"
    if any(name.endswith(SCALES) for name in shapes):
        return (
            [],
            "has scaled fp8 weights, which are not read: take the bf16, fp16 or plain fp8 file",
        )
    there = found(shapes)
    expected = (
        ", or ".join(f"{name}, {signature}" for name, signature in encoders.items())
        or "none of this model"
    )
    like = (
        str(there)
        if there
        else f"no text encoder: {len(shapes)} tensors, named like {min(shapes, default='none')}"
    )
    return [
        name for name in encoders if encoders[name] == there
    ], f"is {like}; expected is {expected}"


def recognized(files: tuple[str, ...], encoders: Mapping[str, Signature]) -> dict[str, Path]:
    """Encoder -> the one of `files` that it is in; of encoders that are alike, in order. ModelError
    with all faults."""
    taken: dict[str, Path] = {}
    faults = []
    for file in files:
        names, fault = file_fault(file, encoders)
        free = [name for name in names if name not in taken]
        if free:
            taken[free[0]] = Path(file)
        else:
            faults.append(
                f"{file}: {f'is {names[0]}, as {taken[names[0]]} is already' if names else fault}"
            )
    if faults:
        raise ModelError("\n  ".join(["--model.text_encoders", *faults]))
    return taken


def load_encoder(
    file: Path, class_name: str, config_folder: Path, dtype: "torch.dtype"
) -> "nn.Module":
    """transformers' encoder of that class and configuration, with the weights in `file`. ModelError
    if some lack."""
    import transformers
    from safetensors.torch import load_file

    encoder_class = getattr(transformers, class_name)
    config, tensors = encoder_class.config_class.from_pretrained(config_folder), load_file(file)
    if "text_projection" in tensors:  # as ComfyUI's older CLIPSave wrote it
        tensors["text_projection.weight"] = tensors.pop("text_projection").T
    if hasattr(config, "text_config") and not any("language_model." in name for name in tensors):
        tensors = {
            re.sub(r"^model\.(?!visual)", "model.language_model.", name): tensors[name]
            for name in tensors
        }
    with unreported():  # what is in the file besides, and what lacks, which is told below
        encoder, told = encoder_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    if lacking := sorted(name for name in told["missing_keys"] if not UNREAD.fullmatch(name)):
        raise ModelError(
            f"--model.text_encoders {file} lacks {len(lacking)} tensors of {class_name}: {', '.join(lacking[:5])}"
        )
    return encoder
