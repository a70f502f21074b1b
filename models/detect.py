"""Detect the family of a model on disk."""

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from common.errors import ModelError
from models import FAMILIES
from models.checkpoint_files import DENOISER_PREFIXES, SCALES, local_path, shapes_of
from models.config import ModelConfig

if TYPE_CHECKING:
    from models.base import ModelFamily


def family_classes() -> dict[str, type["ModelFamily"]]:
    return {name: import_module(module).FAMILY for name, module in FAMILIES.items()}


def family_of(config: ModelConfig) -> type["ModelFamily"]:
    """The family of the model that is there. ModelError if there is none here, or another than
    `config.family` says."""
    path, classes = local_path(config), family_classes()
    if path.is_dir():
        found, what = by_pipeline(path, classes)
    else:
        found, what = by_tensors(path, classes)
    known = f"--model.family is one of {', '.join(classes)}"
    if found is None and config.family is None:
        raise ModelError(
            f"--model.path {config.path} is of no family that is known here: {what}. {known}"
        )
    if found is not None and config.family not in (None, found):
        raise ModelError(f"--model.path {config.path} is {found}, not {config.family}: {what}")
    family = classes[found or config.family or ""]
    if config.guidance_scale is not None and not family.takes_guidance:
        raise ModelError(
            f"--model.guidance_scale {config.guidance_scale:g}: models of the family {family.name} are told none"
        )
    return training_text(family, config) if config.train_text_encoder else family


def training_text(family: type["ModelFamily"], config: ModelConfig) -> type["ModelFamily"]:
    """`family` with its text encoders trained too. ModelError if they cannot be."""
    from models.families.trained_text_encoder import trains_text
    from models.families.unet_family import UNetFamily

    if not issubclass(family, UNetFamily):
        why = f"{config.path} is {family.name}, whose text encoders are not CLIP alone"
        raise ModelError(f"--model.train_text_encoder: {why}")
    return trains_text(family)


def by_pipeline(folder: Path, classes: dict[str, type["ModelFamily"]]) -> tuple[str | None, str]:
    """The family of a diffusers folder, if any, and what says so."""
    try:
        name = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get(
            "_class_name", ""
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"--model.path {folder} has a model_index.json that could not be read as JSON: {error}"
        ) from error
    found = next((family for family, cls in classes.items() if name in cls.pipelines), None)
    return found, f"its model_index.json says {name}"


def by_tensors(file: Path, classes: dict[str, type["ModelFamily"]]) -> tuple[str | None, str]:
    """The family of a single file, if any, and what says so."""
    try:
        shapes = shapes_of(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"--model.path {file} is not a readable .safetensors file: {error}"
        ) from error
    if any(name.endswith(SCALES) for name in shapes):
        raise ModelError(
            f"--model.path {file} has scaled fp8 weights, which are not read: take the bf16, fp16 or plain fp8 file"
        )
    for prefix in DENOISER_PREFIXES:
        shapes |= {
            name.removeprefix(prefix): shapes[name] for name in shapes if name.startswith(prefix)
        }
    found = next((family for family, cls in classes.items() if cls.holds(shapes)), None)
    return (
        found,
        "by the names of its tensors"
        if found
        else f"its {len(shapes)} tensors are named like {min(shapes, default='none')}",
    )
