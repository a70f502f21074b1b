"""The `model` and `objective` sections of the config. No torch here: `--help` reads them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict

from models import FAMILIES

if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[tuple(FAMILIES)]

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ModelError(ValueError):
    """A path that is not a model of the family, or a model that cannot be had."""


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    __pydantic_config__ = STRICT

    path: str | None = None
    """A diffusers folder, a hub id (owner/name), or a single .safetensors file: a checkpoint, or the denoiser alone."""
    family: FamilyName | None = None
    """The model's family; None: recognised. Another one than the model is of is refused. sd15 is Stable Diffusion 1.x
    and 2.x."""
    variant: str | None = None
    """Weight variant of a diffusers folder or hub id, such as fp16."""
    config: str | None = None
    """For a single .safetensors file: a diffusers folder or hub id that holds the configuration and the tokenizers, and
    the text encoders and VAE if the file has none."""
    vae: str | None = None
    """A VAE in place of the model's own: a .safetensors file or a folder of diffusers."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the loss compares."""

    __pydantic_config__ = STRICT

    loss_space: Literal["prediction", "x0"] = "prediction"
    """prediction: the model's own target (noise or velocity). x0: the denoised latents, as ComfyUI's node does, which
    weights noisy samples far more."""


def is_hub_id(path: str) -> bool:
    """Whether it can only be the name of something on the hub: owner/name, where there is no folder `owner` here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not Path(path).parent.exists()


def path_fault(config: ModelConfig) -> str | None:
    """Why `config.path` cannot be a model, or None; looks at names only, so that a typo is found before torch loads."""
    if config.path is None:
        return "no model given. Name a diffusers folder, a hub id or a single .safetensors file"
    path = Path(config.path)
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return None
        return f"{config.path} is a folder without model_index.json, so not a diffusers model"
    if path.is_file():
        if path.suffix == ".safetensors":
            return None
        return f"{config.path} is a {path.suffix or 'nameless'} file; only .safetensors checkpoints are read"
    if is_hub_id(config.path) and path.suffix != ".safetensors":
        return None  # a hub id: asked when the model is loaded
    return f"{config.path} does not exist"
