"""TransformerFamily: a family whose denoiser is a diffusion transformer.

In diffusers it is the pipeline's `transformer`. The original models' code, and ComfyUI, have other
names for its layers, which the family states as a table.
"""

from typing import Any, ClassVar, Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from common.errors import ModelError
from models.block_format import BlockFormat
from models.controls import control_latents
from models.diffusers_family import DiffusersFamily
from models.layer_loading import LayerReader, open_weights
from models.quantization import quantizable_layers
from models.weight_file import WeightFile

ATTENTION = r".*\.attn2?\.(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj)"
"""Target preset: the projections of diffusers' usual attention."""
MLP = r".*\.ff(_context)?\.net\.(0\.proj|2)"
"""Target preset: the layers of diffusers' usual MLP."""
CLIP_L_PREFIX = ("text_encoders.clip_l.",)
CLIP_G_PREFIX = ("text_encoders.clip_g.",)
T5_PREFIX = ("text_encoders.t5xxl.",)
"""Beginnings of the names of text encoders' tensors in a single file, as ComfyUI writes them."""
MAX_NAMED_TENSORS = 5


class TransformerFamily(DiffusersFamily):
    """A transformer over latents of 16 channels."""

    media: Literal["image", "video"] = "image"
    latent_channels = 16
    denoiser_component = "transformer"
    reads_quantized_files = True
    cond_width_key: ClassVar[str] = "joint_attention_dim"
    """The denoiser's config option for the width of the embeddings that it takes."""

    @property
    def cond_width(self) -> int:
        return self.denoiser_config[self.cond_width_key]

    @property
    def guidance(self) -> float:
        """The guidance input of a guidance-distilled model in training: 1, as in other trainers."""
        scale = self.config.guidance_scale
        return 1.0 if scale is None else scale

    def with_controls(self, noisy: Tensor, cond: dict[str, Any]) -> list[Tensor]:
        """Return the noisy latents, followed by those of all control images.

        Those of control images are normalized."""
        images = [noisy]
        for latents in control_latents(cond):
            normalized = self.normalize(latents)
            images.append(normalized.to(noisy.dtype))
        return images

    def load_single_file(
        self, denoiser_class: Any, dtype: torch.dtype, blocks: BlockFormat
    ) -> nn.Module:
        """Load the denoiser of a single file by the table of names, for any size of model."""
        with init_empty_weights(include_buffers=False):
            denoiser = denoiser_class.from_config(self.denoiser_config)
        with open_weights(self.files.path) as file:
            weights = self._reader(denoiser, file).read(dtype, blocks)
            weights |= self.read_buffers(file, dtype)
        # buffers that are not read have their values from the configuration
        denoiser.load_state_dict(weights, strict=False, assign=True)
        return denoiser.eval()

    def _reader(self, denoiser: nn.Module, file: WeightFile) -> LayerReader:
        """Return the reader of a single file's weights for a denoiser without values."""
        keys = self.stored_keys(denoiser)
        self._check_keys({*keys.values()})
        originals = self.layer_names.original(denoiser)
        layers = quantizable_layers(self.blocks(denoiser))
        return LayerReader(denoiser, file, keys, originals, layers)

    def use_stored_formats(self, denoiser: nn.Module) -> None:
        if not self.files.is_quantized:
            return
        with open_weights(self.files.path) as file:
            weights = self._reader(denoiser, file).empty_weights()
        for name, weight in weights.items():
            layer: Any = denoiser.get_submodule(name)
            layer.weight = nn.Parameter(weight, requires_grad=False)

    def read_buffers(self, file: WeightFile, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the denoiser's buffers that are in a single file, by name."""
        return {}

    def _check_keys(self, keys: set[str]) -> None:
        """Raise ModelError if a single file lacks one of the tensors."""
        missing_keys = sorted(keys - self.files.shapes.keys())
        if missing_keys:
            raise ModelError(
                f"--model.path {self.config.path}: lacks {len(missing_keys)} tensors: "
                f"{', '.join(missing_keys[:MAX_NAMED_TENSORS])}. Use a complete file, or the "
                "--model.config of its model"
            )


def pooled_rows(embeds: Tensor, pooled: Tensor) -> list[dict[str, Tensor]]:
    """Return encode_prompt's result for tokens (B, L, D) and pooled embeddings (B, D)."""
    return [
        {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
        for prompt_embeds, pooled_prompt_embeds in zip(embeds, pooled, strict=True)
    ]
