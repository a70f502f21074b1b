"""Keys of adapter files: the layer and the tensor that a key means."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

from lora_algos import ALGORITHMS
from lora_algos.detection import all_algorithms
from lora_algos.tensors import COMMON_NAMES

UNSUPPORTED_TENSORS = {
    "rescale": "an OFT with rescale, which ComfyUI and PEFT do not read either",
    "oft_R.weight": "an OFT of PEFT, which rotates the layer's input; all other programs rotate its output",
    "set_weight": "a whole weight (set_weight)",
    "reshape_weight": "a weight of another shape (reshape_weight)",
    "bm.weight": "a GLoRA with a Tucker core",
}
"""Tensors of other programs that have no equivalent here -> their description."""
FOREIGN_ENDINGS = {
    ".lora_A.weight": "lora_down.weight",
    ".lora_A.default.weight": "lora_down.weight",
    ".lora_A": "lora_down.weight",
    ".lora.down.weight": "lora_down.weight",
    ".lora_linear_layer.down.weight": "lora_down.weight",
    "_lora.down.weight": "lora_down.weight",
    ".lora_B.weight": "lora_up.weight",
    ".lora_B.default.weight": "lora_up.weight",
    ".lora_B": "lora_up.weight",
    ".lora.up.weight": "lora_up.weight",
    ".lora_linear_layer.up.weight": "lora_up.weight",
    "_lora.up.weight": "lora_up.weight",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
    ".lora_magnitude_vector.default.weight": "lora_magnitude_vector",
    ".lora_magnitude_vector.default": "lora_magnitude_vector",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
}
"""End of a key in files of other programs -> name of the tensor here."""
PROCESSOR = re.compile(r"\.processor\.(to_out)$|\.processor\.")
"""Part of layer names in old files of diffusers: `attn1.processor.to_q`."""


class SplitKey(NamedTuple):
    """A key of a file."""

    spelling: str
    """Name of the layer in the file."""
    tensor_name: str
    """Name of the tensor here; empty if no program writes such a tensor."""


class Ending(NamedTuple):
    """The end of a key, and the name of its tensor here."""

    text: str
    tensor_name: str


def tensor_endings() -> list[Ending]:
    """Return the ends of all keys of tensors, the longest one first."""
    return _tensor_endings(tuple(ALGORITHMS.items()))


@cache
def _tensor_endings(registry: tuple[tuple[str, str], ...]) -> list[Ending]:
    """Return `tensor_endings` of the algorithms in a registry."""
    names = [*COMMON_NAMES, *UNSUPPORTED_TENSORS]
    for algorithm in all_algorithms():
        names += algorithm.traits.names
        names += algorithm.traits.files.foreign_names
    texts = dict(FOREIGN_ENDINGS)
    for name in names:
        texts[f".{name}"] = name
    endings = [Ending(text, name) for text, name in texts.items()]
    endings.sort(key=lambda ending: len(ending.text), reverse=True)
    return endings


def split_key(key: str) -> SplitKey:
    """Return the layer and the tensor that a file's key means."""
    for ending in tensor_endings():
        if key.endswith(ending.text):
            layer = key.removesuffix(ending.text)
            spelling = PROCESSOR.sub(without_processor, layer)
            return SplitKey(spelling, ending.tensor_name)
    return SplitKey(key, "")


def without_processor(match: re.Match) -> str:
    """Return the replacement of a match of PROCESSOR."""
    return ".to_out.0" if match[1] else "."


class GroupedKeys(NamedTuple):
    """Keys of a file by layer."""

    layers: dict[str, dict[str, str]]
    """Layer -> name of a tensor here -> key."""
    errors: list[str]
    """A line for each key that belongs to no layer."""


def group_keys(
    shapes: Mapping[str, tuple[int, ...]], layers_by_spelling: Mapping[str, list[str]]
) -> GroupedKeys:
    """Group the keys of a file, given with their shapes, by layer."""
    keys_by_layer: dict[str, dict[str, str]] = {}
    errors = []
    for key, shape in shapes.items():
        spelling, name = split_key(key)
        if not name:
            errors.append(f"{key} {shape}: not a tensor of an adapter")
            continue
        layers = layers_by_spelling.get(spelling)
        if not layers:
            errors.append(f"{key} {shape}: the model has no layer of this name")
            continue
        other_key = assigned_key(keys_by_layer, layers, name)
        if other_key:
            errors.append(f"{key} {shape}: the same tensor as {other_key}")
            continue
        for layer in layers:
            keys_by_layer.setdefault(layer, {})[name] = key
    return GroupedKeys(keys_by_layer, errors)


def assigned_key(
    keys_by_layer: Mapping[str, Mapping[str, str]],
    layers: list[str],
    tensor_name: str,
) -> str:
    """Return the key that one of these layers already has for a tensor, or an empty text."""
    for layer in layers:
        keys = keys_by_layer.get(layer, {})
        if tensor_name in keys:
            return keys[tensor_name]
    return ""


MODEL_PATTERNS = (
    ("FLUX", r"single_transformer_blocks|double_blocks|single_blocks"),
    ("Stable Diffusion 3", r"joint_blocks|joint_attn"),
    (
        "Stable Diffusion XL",
        r"(attentions|blocks)[._]\d+[._](\d+[._])?transformer_blocks[._][2-9]"
        r"|add_embedding|label_emb|lora_te2_",
    ),
    ("a multimodal transformer (SD3, FLUX, Qwen-Image)", r"add_q_proj|img_mlp|txt_mlp"),
    ("Anima", r"blocks[._]\d+[._](self_attn|cross_attn)[._](q|k|v|output)_proj|adaln_modulation_"),
    ("Wan", r"blocks[._]\d+[._](self_attn|cross_attn)|condition_embedder"),
    (
        "a UNet (Stable Diffusion 1, 2 or XL)",
        r"down_blocks|up_blocks|input_blocks|output_blocks",
    ),
    ("a text encoder", r"lora_te|text_encoder|text_model"),
)
"""(Model, pattern in the keys of its files). The first match is used in messages."""


def guess_model(keys: Iterable[str]) -> str:
    """Return the model that the keys of a file seem to belong to; empty if they do not show it."""
    text = "\n".join(keys)
    for model, pattern in MODEL_PATTERNS:
        if re.search(pattern, text):
            return model
    return ""
