"""The `model` section of the config. This module imports no torch, because `--help` reads it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field

from common.config_fields import CHANGEABLE, STRICT
from models import FAMILIES

if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[tuple(FAMILIES)]
WEIGHT_SUFFIXES = (".safetensors", ".gguf")
"""Suffixes of files of a model's weights."""
INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"
"""The files that list the components of a pipeline, and of a modular pipeline."""
HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([\w./-]+\.safetensors)", re.ASCII)
"""owner/name/file.safetensors"""
Quantization = Literal["none", "fp8", "int8", "nf4"]
"""Format of frozen weights: none, or a key of FORMATS in models/quantization.py."""
Placement = Literal["device", "layers", "cpu"]
"""Place of the text encoders while they encode."""


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    __pydantic_config__ = STRICT

    path: str | None = None
    """A diffusers folder, a Hub id (owner/name), or a single .safetensors or .gguf file: a checkpoint
    or a denoiser."""
    family: FamilyName | None = None
    """Model family (docs/models.md). Detected from the model if not set; must match it."""
    variant: str | None = None
    """Weight variant of a diffusers folder or Hub id, such as fp16."""
    config: str | None = None
    """For a single file: a diffusers folder or Hub id with the configuration and the
    tokenizers, and with all components that the file does not contain. None: the Hub repository of
    the same kind of model."""
    quantization: Quantization = "none"
    """Format of the frozen weights of the denoiser's blocks. fp8 and int8: a byte per weight. nf4:
    about half a byte. Each layer is converted back while it computes, which costs time. Adapters are
    trained for the rounded weights. none: weights of GGUF and scaled fp8 files stay in their format."""
    train_text_encoder: bool = False
    """Adapt the text encoders too, if all of them are CLIP (docs/models.md). Captions are then encoded
    in every step."""
    vae: str | None = None
    """A VAE that replaces the model's own: a .safetensors file or a diffusers folder."""
    vae_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """dtype in which the VAE encodes images. bf16 and fp16 need half the memory; fp16 is refused for
    a VAE that overflows, such as SDXL's first one."""
    vae_tiling: bool = False
    """Encode and decode large images in overlapping tiles, which needs less memory. It changes the
    latents a little at the tiles' borders."""
    text_encoders: tuple[str, ...] = ()
    """Text encoders that replace the model's own, or for a file without any: .safetensors or .gguf
    files as in ComfyUI's models/text_encoders. Which encoder a file holds is detected from its tensors."""
    text_encoder_quantization: Quantization = "none"
    """Format of the weights of text encoders with over a billion parameters, such as T5-XXL. It takes
    less memory, on the GPU and on the CPU, and changes the conditioning a little. none: weights of GGUF
    and scaled fp8 files stay in their format."""
    text_encoder_placement: Annotated[Placement, CHANGEABLE] = "device"
    """Place of the text encoders while captions are encoded. device: on the GPU as a whole. layers:
    in CPU memory; each layer is copied to the GPU when it is needed. cpu: encode on the CPU."""
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    """Guidance input of a guidance-distilled model, such as FLUX.1 dev, in training. None: 1."""
    assistant_lora: str | None = None
    """For a distilled model: a training adapter, a LoRA that undoes the distillation. A .safetensors
    file, a folder of PEFT or owner/name/file.safetensors of the Hub. It is frozen and not exported.
    sample.assistant_strength: its strength in samples."""
    expert: Literal["high", "low"] | None = None
    """For a model with two denoisers, such as Wan 2.2 A14B: the one to train, at high or at low noise
    levels."""


DISTILLED_NAME = re.compile(
    r"turbo|schnell|lightning|distill|(?<![a-z])lcm(?![a-z])", re.IGNORECASE
)
"""Part of the name of a model that was distilled to few steps."""
UNDISTILLED_NAME = re.compile(r"(de|un)[-_]?(turbo|schnell|distill)", re.IGNORECASE)
"""Part of the name of a model whose distillation was undone."""


def has_distilled_name(path: str) -> bool:
    """Return whether the name of a model says that it was distilled to few steps."""
    return DISTILLED_NAME.search(Path(path).name) is not None


def has_undistilled_name(path: str) -> bool:
    """Return whether the name of a model says that its distillation was undone."""
    return UNDISTILLED_NAME.search(Path(path).name) is not None


def is_hub_id(path: str) -> bool:
    """Return whether a path is owner/name and there is no local folder `owner`: a Hub id."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not Path(path).parent.exists()


class HubFile(NamedTuple):
    """A file in a repository of the Hub."""

    repo: str
    name: str


def hub_file_of(path: str) -> HubFile | None:
    """Return the file that a path owner/name/file.safetensors means; None for a local path."""
    match = HUB_FILE.fullmatch(path)
    if match is None or ".." in path or Path(path).exists() or Path(match[1]).parent.exists():
        return None
    return HubFile(match[1], match[2])


def assistant_error(config: ModelConfig) -> str | None:
    """Return why `config.assistant_lora` cannot be one, as the text after its flag, or None. Looks at
    names only."""
    if config.assistant_lora is None or hub_file_of(config.assistant_lora) is not None:
        return None
    path = Path(config.assistant_lora)
    rule = (
        "expected a .safetensors file, a folder of PEFT, or owner/name/file.safetensors of the Hub"
    )
    if not path.exists():
        return f" {path}: does not exist; {rule}. Check the path"
    if path.is_file() and path.suffix != ".safetensors":
        return f" {path}: is a {path.suffix or 'nameless'} file; {rule}. Choose another file"
    return None


def text_encoder_errors(config: ModelConfig) -> list[str]:
    """Return the errors in the names of `config.text_encoders`, each beginning with the path."""
    errors = []
    for path in map(Path, config.text_encoders):
        if path.is_dir():
            errors.append(
                f"{path}: is a folder; expected .safetensors or .gguf files. Name the files in it"
            )
        elif not path.is_file():
            errors.append(f"{path}: does not exist")
        elif path.suffix not in WEIGHT_SUFFIXES:
            errors.append(
                f"{path}: is a {path.suffix or 'nameless'} file; expected .safetensors or .gguf files"
            )
    return errors


def index_path(folder: Path) -> Path:
    """Return the path of the index in a diffusers folder."""
    modular_path = folder / MODULAR_INDEX
    return modular_path if modular_path.is_file() else folder / INDEX


def path_error(config: ModelConfig) -> str | None:
    """Return why `config.path` cannot be a model, as the text after `--model.path`, or None. Looks
    at names only."""
    if config.path is None:
        return ": no model given. Name a diffusers folder, a Hub id or a single .safetensors or .gguf file"
    path = Path(config.path)
    if path.is_dir():
        if index_path(path).is_file():
            return None
        return f" {config.path}: is a folder without {INDEX}; expected a diffusers model"
    if path.is_file():
        if path.suffix in WEIGHT_SUFFIXES:
            return None
        return (
            f" {config.path}: is a {path.suffix or 'nameless'} file; expected a .safetensors or "
            ".gguf file"
        )
    if is_hub_id(config.path) and path.suffix not in WEIGHT_SUFFIXES:
        return None  # it is looked up when the model is loaded
    return f" {config.path}: does not exist"
