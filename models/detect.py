"""Detection of the family of a model on disk."""

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError

from common.errors import ModelError
from models import FAMILIES, family_classes
from models.checkpoint_files import (
    local_path,
    read_index,
    tensor_shapes,
    without_denoiser_prefix,
)
from models.config import ModelConfig
from models.stored_formats import check_formats

if TYPE_CHECKING:
    from models.base import ModelFamily


ADAPTER_KEY = re.compile(r"[._](lora_|hada_|lokr_|oft_)|^lora_")
"""Part of the keys of adapter files."""


class Detection(NamedTuple):
    """The name of a model's family, None if it is not known, and the reason."""

    family: str | None
    reason: str


def get_family(config: ModelConfig) -> "ModelFamily":
    """Return the family of the model at --model.path, bound to it.

    Raises ModelError if the family is not supported, or is not --model.family, or cannot train the
    model."""
    name = detect_family(config)
    family_class = family_classes()[name]
    if config.train_text_encoder:
        family_class = with_text_encoders(name, config)
    family = family_class(config)
    family.check()
    return family


def detect_family(config: ModelConfig) -> str:
    """Return the name of the model's family. Raises ModelError if it is not --model.family."""
    path = local_path(config)
    detection = detect_by_pipeline(path) if path.is_dir() else detect_by_file(path, config)
    name = detection.family or config.family
    if name is None:
        raise ModelError(
            f"--model.path {config.path}: is not a model of a supported family: "
            f"{detection.reason}. Supported are {', '.join(FAMILIES)}; set --model.family if it "
            "is one of these"
        )
    if config.family not in (None, name):
        raise ModelError(
            f"--model.path {config.path}: is {name}, not {config.family}: {detection.reason}. "
            f"Use the recipe of {name}, or remove --model.family"
        )
    return name


def detect_by_file(file: Path, config: ModelConfig) -> Detection:
    """Detect the family of a single file by its tensors.

    Several families may have the same tensors. Then --model.family or --model.config decides."""
    detection = detect_by_tensors(file)
    described_family = config.family
    if described_family is None and config.config is not None:
        described_family = family_of_configuration(config.config)
    if described_family is None or detection.family is None:
        return detection
    if family_classes()[described_family].same_files_as == detection.family:
        return Detection(described_family, "it has the same tensors as other models")
    return detection


def family_of_configuration(source: str) -> str | None:
    """Return the family of a diffusers folder or Hub id; None if it is not readable or not known."""
    try:
        index = read_index(source)
    except (OSError, ValueError):
        return None  # reported when the configuration is used
    return family_of_pipeline(str(index.get("_class_name")))


def family_of_pipeline(pipeline: str) -> str | None:
    """Return the family that a pipeline of diffusers belongs to."""
    for name, family_class in family_classes().items():
        if pipeline in family_class.pipelines:
            return name
    return None


def detect_by_pipeline(folder: Path) -> Detection:
    """Detect the family of a diffusers folder by the pipeline that its index names."""
    try:
        index = read_index(str(folder))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"--model.path {folder}: its model_index.json could not be read as JSON: {error}"
        ) from error
    pipeline = index.get("_class_name", "")
    reason = f"its model_index.json names {pipeline}"
    return Detection(family_of_pipeline(pipeline), reason)


def detect_by_tensors(file: Path) -> Detection:
    """Detect the family of a single file by the names and shapes of its tensors."""
    try:
        shapes = tensor_shapes(file)
        check_formats(file)
    except ModelError as error:
        raise ModelError(f"--model.path {error}") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"--model.path {file}: is not a readable .safetensors file: {error}"
        ) from error
    denoiser_shapes = without_denoiser_prefix(shapes)
    for name, family_class in family_classes().items():
        if family_class.matches_checkpoint(denoiser_shapes):
            return Detection(name, "its tensors have the names of this family")
    if any(ADAPTER_KEY.search(key) for key in shapes):
        raise ModelError(
            f"--model.path {file}: is an adapter file; expected a base model. Name the adapter "
            "with --existing_lora"
        )
    first_name = min(denoiser_shapes, default="none")
    return Detection(None, f"its {len(shapes)} tensors are named like {first_name}")


def with_text_encoders(name: str, config: ModelConfig) -> "type[ModelFamily]":
    """Return the class of a family whose text encoders are trained too. Raises ModelError."""
    trainable_families = {}
    for family, module in FAMILIES.items():
        family_class = getattr(import_module(module), "FAMILY_WITH_TEXT_ENCODERS", None)
        if family_class is not None:
            trainable_families[family] = family_class
    if name not in trainable_families:
        raise ModelError(
            f"--model.train_text_encoder: {config.path} is {name}, whose text encoders cannot be "
            f"trained. Only those of {', '.join(trainable_families)} can; remove the option"
        )
    return trainable_families[name]
