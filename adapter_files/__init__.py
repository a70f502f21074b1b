"""Adapter files: their formats, their keys and their metadata. Importing this module imports no
torch."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

FORMATS: dict[str, str] = {
    "kohya": "write_kohya",
    "comfyui": "write_comfyui",
    "diffusers": "write_diffusers",
    "peft": "write_peft",
}
"""`--export.formats` -> the function in adapter_files/writers.py that writes the format."""


def get_writer(file_format: str) -> Callable[..., Any]:
    """Return the writer of a format, a key of `FORMATS`."""
    return getattr(import_module("adapter_files.writers"), FORMATS[file_format])
