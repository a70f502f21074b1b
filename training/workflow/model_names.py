"""Names of a model's files in ComfyUI's folders."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from models.base import ModelFamily
from models.comfy_nodes import ComfyNodes

EXPERTS = ("high", "low")
"""The experts of a model in the order in which they draw."""
EXPERT_NAME = re.compile("(high|low)([_-]?noise)", re.IGNORECASE)
"""Part of a file's name that tells which expert it is."""


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
    if not family.files.is_single_file:
        name += ".safetensors"
    if family.has_experts:
        return expert_files(name, family.config.expert or "high")
    return [name]


def expert_files(name: str, trained_expert: str) -> list[str]:
    """Return the files of both experts. `name`: of the model, or of the file of the trained expert."""
    path = Path(name)
    names = []
    for expert in EXPERTS:
        if EXPERT_NAME.search(name):
            names.append(EXPERT_NAME.sub(rf"{expert}\2", name))
        elif expert == trained_expert:
            names.append(name)
        else:
            names.append(f"{path.stem}_{expert}_noise{path.suffix}")
    return names


def text_encoder_files(family: ModelFamily, nodes: ComfyNodes) -> tuple[str, ...]:
    """Return the names of the text encoders' files: those of the run, or the usual ones."""
    run_files = family.config.text_encoders
    usual_files = nodes.text_encoders
    if "text_encoder_3" in family.files.missing_components:  # SD3 without T5
        usual_files = usual_files[:2]
    if len(run_files) != len(usual_files):
        return usual_files
    return tuple(Path(path).name for path in run_files)


def vae_file(family: ModelFamily, nodes: ComfyNodes) -> str:
    """Return the name of the VAE's file."""
    path = family.config.vae
    if path is None:
        return nodes.vae or nodes.separate_vae
    name = Path(path).name
    return name if Path(path).is_file() else f"{name}.safetensors"


def is_checkpoint(family: ModelFamily, nodes: ComfyNodes) -> bool:
    """Return whether ComfyUI loads the base model, with its VAE, as a checkpoint."""
    if family.files.is_single_file:
        return "vae" in family.files.contained_components
    return not nodes.vae


def is_whole_checkpoint(family: ModelFamily) -> bool:
    """Return whether the base model is a single file with its VAE and its text encoders."""
    components = family.files.contained_components
    has_text_encoders = any(name.startswith("text_encoder") for name in components)
    return "vae" in components and has_text_encoders
