"""What diffusion transformers have in common: they are diffusers' `transformer`, and their layers
have other names in the original models' code, which ComfyUI has kept.
"""

from functools import cached_property
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn

from common.errors import ModelError
from models.base import Native, check_comfy_cond
from models.checkpoint_files import denoiser_prefix
from models.diffusers_family import DiffusersFamily
from models.layer_names.transformers import Table, renamed, stored_names

ATTENTION = r".*\.attn2?\.(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj)"
MLP = r".*\.ff(_context)?\.net\.(0\.proj|2)"


class TransformerFamily(DiffusersFamily):
    """A transformer over latents of 16 channels."""

    media = "image"
    latent_channels = 16
    component = "transformer"
    vae_class = "AutoencoderKL"
    file_formats: tuple[str, ...] = ("diffusers", "comfyui")
    by_diffusers = "transformer."
    kohya_is_native = True
    names: ClassVar[Table]
    """From diffusers' names of layers to the original ones."""
    native_only: ClassVar[str] = "(?!)"
    """The layers that ComfyUI does not know by diffusers' name."""

    def native_names(self, denoiser: nn.Module) -> dict[str, Native]:
        return renamed(denoiser, self.names, self.native_only)

    def stored_names(self, denoiser: nn.Module) -> dict[str, str]:
        if self.path.is_dir():
            return {name: name for name, _ in denoiser.named_parameters()}
        return stored_names(denoiser, self.names, self.stored_shapes)

    @cached_property
    def stored_prefix(self) -> str:
        """What stands before the names of the denoiser's weights in a single file."""
        return denoiser_prefix(self.stored_shapes)

    @property
    def guidance(self) -> float:
        """What a model that is distilled for guidance is told of it in training: 1, as other
        trainers do."""
        return 1.0 if self.config.guidance_scale is None else self.config.guidance_scale

    def denoiser_by_names(self, denoiser_class: Any, dtype: torch.dtype) -> nn.Module:
        """The denoiser in a single file, read by the table of names; for any size of model."""
        with init_empty_weights(include_buffers=False):
            denoiser = denoiser_class.from_config(self.denoiser_config)
        wanted = self.stored_names(denoiser)
        if missing := sorted(set(wanted.values()) - self.stored_shapes.keys()):
            raise ModelError(
                f"--model.path {self.config.path} lacks {len(missing)} tensors: {', '.join(missing[:5])}"
            )
        native, state = self.native_names(denoiser), {}
        with safe_open(self.path, framework="pt") as file:
            for name, key in wanted.items():
                layer = native.get(name.rpartition(".")[0], Native(key))
                first, count = layer.rows or (0, None)
                part = file.get_slice(key)[first : count and first + count].to(dtype)
                state[name] = part.roll(len(part) // 2, 0) if layer.swapped else part
        denoiser.load_state_dict(state, assign=True)
        return denoiser.eval()


class PooledTextFamily(TransformerFamily):
    """A transformer that is given the tokens of text encoders, and a pooled vector of theirs."""

    @property
    def _width(self) -> int:
        return self.denoiser_config["joint_attention_dim"]

    @property
    def _pooled_width(self) -> int:
        return self.denoiser_config["pooled_projection_dim"]

    def cond_from_comfy(self, cond: Tensor, extras: dict[str, Any]) -> dict[str, Tensor]:
        check_comfy_cond(cond, self._width)
        return {
            "prompt_embeds": cond[0],
            "pooled_prompt_embeds": comfy_pooled(extras, self._pooled_width),
        }

    def cond_to_comfy(self, cond: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        return cond["prompt_embeds"][None], {"pooled_output": cond["pooled_prompt_embeds"][None]}


def pooled_rows(embeds: Tensor, pooled: Tensor) -> list[dict[str, Tensor]]:
    """`encode_prompt` of text encoders' tokens (B, L, D) and pooled vectors (B, D)."""
    return [
        {"prompt_embeds": embed, "pooled_prompt_embeds": one}
        for embed, one in zip(embeds, pooled, strict=True)
    ]


def counts(tokenizer: Any, captions: list[str], most: int) -> tuple[list[int], int]:
    """`token_counts` of an encoder that sees `most` tokens, its own marks among them."""
    found = [
        len(tokens)
        for tokens in tokenizer(captions, add_special_tokens=False, verbose=False).input_ids
    ]
    return found, most - tokenizer.num_special_tokens_to_add()


def comfy_pooled(extras: dict[str, Any], width: int) -> Tensor:
    """(width,) ComfyUI's pooled_output; ModelError if there is none of that width."""
    pooled = extras.get("pooled_output")
    if pooled is None or pooled.shape != (1, width):
        there = "without" if pooled is None else f"of shape {tuple(pooled.shape)} as"
        raise ModelError(f"conditioning {there} pooled_output; this model takes (1, {width})")
    return pooled[0]
