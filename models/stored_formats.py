"""Formats of quantized weights in .safetensors files, by name, and the error for those that are not
read. This module imports no torch, because it serves the detection of models."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from common.errors import ModelError
from models.checkpoint_files import COMPANION_SUFFIXES

READ_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
"""ComfyUI's names of formats that are read."""
ROTATION = "convrot"
"""Option of a format whose weights are rotated, which is not read."""
DTYPES_OF_CODES = ("F8_E4M3", "F8_E5M2", "I8", "U8")
"""dtypes of codes, as safetensors names them."""
MARKER = ".comfy_quant"
HEADER_FIELD = "_quantization_metadata"
BITSANDBYTES = ".quant_state.bitsandbytes__"
"""Part of the names of tensors in files of bitsandbytes."""


def check_formats(path: Path) -> None:
    """Raise ModelError if weights of a .safetensors file are in a format that is not read.

    Raises OSError or SafetensorError too. The types in a GGUF file are checked when its shapes are
    read."""
    if path.suffix != ".safetensors":
        return
    with safe_open(path, framework="pt") as file:
        formats = set(format_names(file))
    if formats:
        raise ModelError(
            f"{path}: has weights in {' and '.join(sorted(formats))}; expected plain weights, "
            f"{', '.join(READ_FORMATS)}, or GGUF. Use another file of this model"
        )


def quantized_file_message(path: str | None, family: str) -> str:
    """Return the error for a family whose quantized files are not read."""
    return (
        f"--model.path {path}: is a GGUF or quantized file, which cannot be read for {family}. Use "
        "a .safetensors file in fp16 or bf16; --model.quantization int8 quantizes it"
    )


def format_names(file: Any) -> Iterator[str]:
    """Yield the names of formats in an open file that are not read."""
    keys = list(file.keys())
    if any(BITSANDBYTES in key for key in keys):
        yield "a format of bitsandbytes"
    yield from unknown_scales(file, set(keys))
    for options in comfy_formats(file, keys):
        name = str(options.get("format"))
        if options.get(ROTATION):
            yield f"{name} with {ROTATION}"
        elif name not in READ_FORMATS:
            yield name


def unknown_scales(file: Any, keys: set[str]) -> Iterator[str]:
    """Yield the names of scales that are not known, of weights that are codes."""
    for key in keys:
        layer, _, name = key.rpartition(".")
        weight_key = f"{layer}.weight"
        if "scale" not in name or key.endswith(COMPANION_SUFFIXES) or weight_key not in keys:
            continue
        if file.get_slice(weight_key).get_dtype() in DTYPES_OF_CODES:
            yield f"codes with {name}"


def comfy_formats(file: Any, keys: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield the options of each quantized layer, as ComfyUI writes them."""
    texts = []
    header = file.metadata() or {}
    if HEADER_FIELD in header:
        layers = parsed(header[HEADER_FIELD]).get("layers")
        if isinstance(layers, dict):
            yield from (options for options in layers.values() if isinstance(options, dict))
    for key in keys:
        if key.endswith(MARKER):
            texts.append(bytes(file.get_tensor(key).tolist()).decode("utf-8", "replace"))
    for text in set(texts):
        yield parsed(text)


def parsed(text: str) -> dict[str, Any]:
    """Return the JSON object in a text; {} if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
