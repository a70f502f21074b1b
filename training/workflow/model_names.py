"""Names of a model's files in ComfyUI's folders."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from models.base import ModelFamily
from models.comfy_nodes import ComfyNodes

EXPERT_NAMES = ("high_noise", "low_noise")
"""Parts of the names of Wan 2.2's two files, in the order in which they draw."""


@cache
def known_files() -> dict[str, Any]:
    """Return `hub_ids` (Hub id -> names of files) and `files` (name -> `directory` and, if it is known,
    `url`).

    The names and addresses are those of ComfyUI's own example workflows; files without an address are in
    the repository of their model."""
    path = Path(__file__).with_name("files.json")
    return json.loads(path.read_text(encoding="utf-8"))


def downloads() -> dict[str, dict[str, str]]:
    """Return name, directory and address of the files that ComfyUI can download, by their name."""
    entries = {}
    for name, entry in known_files()["files"].items():
        if "url" in entry:
            entries[name] = {"name": name, **entry}
    return entries


def base_files(family: ModelFamily) -> list[str]:
    """Return the name of the base model's file; two names for a model with two experts."""
    path = str(family.config.path)
    names = known_files()["hub_ids"].get(path)
    if names is not None:
        return list(names)
    name = Path(path).name
    if family.files.is_single_file:
        return expert_files(name)
    if family.has_experts:
        return [f"{name}_{part}.safetensors" for part in EXPERT_NAMES]
    return [f"{name}.safetensors"]


def expert_files(name: str) -> list[str]:
    """Return the files of both experts, given one of them; other files alone."""
    for part in EXPERT_NAMES:
        if part in name:
            return [name.replace(part, other) for other in EXPERT_NAMES]
    return [name]


def text_encoder_files(family: ModelFamily, nodes: ComfyNodes) -> tuple[str, ...]:
    """Return the names of the text encoders' files: those of the run, or the usual ones."""
    run_files = family.config.text_encoders
    if len(run_files) != len(nodes.text_encoders):
        return nodes.text_encoders
    return tuple(Path(path).name for path in run_files)


def vae_file(family: ModelFamily, nodes: ComfyNodes) -> str:
    """Return the name of the VAE's file; empty if the VAE is in the checkpoint."""
    path = family.config.vae
    if path is None:
        return nodes.vae
    name = Path(path).name
    return name if Path(path).suffix else f"{name}.safetensors"


def is_whole_checkpoint(family: ModelFamily) -> bool:
    """Return whether the base model is a single file with its VAE and its text encoders."""
    components = family.files.contained_components
    has_text_encoders = any(name.startswith("text_encoder") for name in components)
    return "vae" in components and has_text_encoders
