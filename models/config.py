"""The `model` and `objective` sections of the config. No torch here: `--help` reads them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from common.strict import STRICT
from models import FAMILIES

if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[tuple(FAMILIES)]


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    __pydantic_config__ = STRICT

    path: str | None = None
    """A diffusers folder, a hub id (owner/name), or a single .safetensors file: a checkpoint, or the denoiser alone."""
    family: FamilyName | None = None
    """The model's family; None: recognised. Another one than the model is of is refused. sd15 is Stable Diffusion 1.x
    and 2.x, sd3 is 3 and 3.5, wan is Wan 2.1 and 2.2 of text, wan_i2v of an image."""
    variant: str | None = None
    """Weight variant of a diffusers folder or hub id, such as fp16."""
    config: str | None = None
    """For a single .safetensors file: a diffusers folder or hub id that holds the configuration and the tokenizers, and
    the text encoders and VAE if the file has none."""
    train_text_encoder: bool = False
    """Adapt the CLIP text encoders too (Stable Diffusion 1, 2 and XL): captions are then encoded in every step, not
    once before training. Their layers' names begin with text_encoder."""
    vae: str | None = None
    """A VAE in place of the model's own: a .safetensors file or a folder of diffusers."""
    text_encoders: tuple[str, ...] = ()
    """Text encoders in place of the model's own, or for a file without any: .safetensors files as in ComfyUI's
    text_encoders folder. Which one each is, is recognised; configuration and tokenizer are those of `config`."""
    guidance: Annotated[float, Field(ge=0)] | None = None
    """The guidance that a guidance-distilled model (FLUX.1 dev, FLUX.2 dev) is told in training; None: 1. Previews have
    their own."""
    expert: Literal["high", "low"] | None = None
    """Of a model with two denoisers (Wan 2.2 A14B), the one that is trained, within its noise levels: the one for high
    noise or the one for low noise. None: the one for high noise, and of a single file, which holds either, an error. An
    adapter of each is trained in a run of its own."""


def is_hub_id(path: str) -> bool:
    """Whether it can only be the name of something on the hub: owner/name, where there is no folder `owner` here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not Path(path).parent.exists()


def text_encoder_faults(config: ModelConfig) -> list[str]:
    """What is wrong with the names of `config.text_encoders`."""
    faults = []
    for path in map(Path, config.text_encoders):
        if path.is_file() and path.suffix != ".safetensors":
            faults.append(f"{path} is a {path.suffix or 'nameless'} file; only .safetensors files are read")
        elif not path.is_file():
            faults.append(f"{path} {'is a folder: name the files in it' if path.is_dir() else 'does not exist'}")
    return faults


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
