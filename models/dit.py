"""What diffusion transformers have in common: they are diffusers' `transformer`, and their layers have other names in
the original models' code, which ComfyUI has kept.
"""

from functools import cached_property
from typing import Any, ClassVar

from safetensors import safe_open
from torch import Tensor, nn

from models.base import Native
from models.checkpoints import DENOISER_PREFIXES
from models.config import ModelError
from models.dit_names import Table, renamed
from models.loading import DiffusersFamily


class TransformerFamily(DiffusersFamily):
    """A transformer over latents of 16 channels."""

    media = "image"
    latent_channels = 16
    component = "transformer"
    vae_class = "AutoencoderKL"
    file_formats = ("comfyui",)
    by_diffusers = "transformer."
    kohya_is_native = True
    names: ClassVar[Table]
    """From diffusers' names of layers to the original ones."""
    native_only: ClassVar[str] = "(?!)"
    """The layers that ComfyUI does not know by diffusers' name."""

    def native_names(self, denoiser: nn.Module) -> dict[str, Native]:
        return renamed(denoiser, self.names, self.native_only)

    def stored_names(self, denoiser: nn.Module) -> dict[str, str]:
        names = [name for name, _ in denoiser.named_parameters()]
        if self.path.is_dir():
            return {name: name for name in names}
        native, found = self.native_names(denoiser), {}
        for name in names:
            layer, _, kind = name.rpartition(".")
            own = f"{native[layer].name}.{kind}" if layer in native else self.bare_name(name)
            found[name] = self.stored_prefix + own
        return found

    def bare_name(self, name: str) -> str:
        """The original name of a parameter that is of no layer."""
        return name

    @cached_property
    def stored_prefix(self) -> str:
        """What stands before the names of the denoiser's weights in a single file."""
        with self._faults_told(), safe_open(self.path, framework="pt") as file:
            names = list(file.keys())
        return next((p for p in DENOISER_PREFIXES if any(name.startswith(p) for name in names)), "")


def counts(tokenizer: Any, captions: list[str], most: int) -> tuple[list[int], int]:
    """`token_counts` of an encoder that sees `most` tokens, its own marks among them."""
    found = [len(tokens) for tokens in tokenizer(captions, add_special_tokens=False, verbose=False).input_ids]
    return found, most - tokenizer.num_special_tokens_to_add()


def comfy_pooled(extras: dict[str, Any], width: int) -> Tensor:
    """(width,) ComfyUI's pooled_output; ModelError if there is none of that width."""
    pooled = extras.get("pooled_output")
    if pooled is None or pooled.shape != (1, width):
        there = "without" if pooled is None else f"of shape {tuple(pooled.shape)} as"
        raise ModelError(f"conditioning {there} pooled_output; this model takes (1, {width})")
    return pooled[0]
