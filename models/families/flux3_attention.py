"""Attention of FLUX.3 over captions of different lengths.

diffusers draws one prompt at a time, so its model takes no mask. But the positions of tokens reach the
attention of every block. Here they may have one more column for each sample of the batch: 1 where a token
is padding of that sample. Drawing adds no columns.
"""

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux3 import (
    Flux3Attention,
    Flux3AttnProcessor,
    Flux3PosEmbed,
)
from torch import Tensor, nn


class PaddedPositions(Flux3PosEmbed):
    """Keeps the columns of padding behind the cosines."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        cosines, sines = super().forward(ids)
        num_axes = len(self.axes_dim)
        is_padding = ids[:, num_axes:].to(cosines.dtype)
        marked_cosines = torch.cat([cosines, is_padding], 1)
        return marked_cosines, sines


class KeyMaskProcessor(Flux3AttnProcessor):
    """Hides padding from all tokens. It hides keys alone; see chroma_attention.py."""

    def __call__(
        self,
        attn: Flux3Attention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        cosines, sines = image_rotary_emb
        width = sines.shape[1]
        is_padding = cosines[:, width:]
        key_mask = attention_mask
        if is_padding.shape[1]:
            is_shown = is_padding == 0
            by_sample = is_shown.T
            key_mask = by_sample[:, None, None]
        rotary = (
            cosines[:, :width],
            sines,
        )
        return super().__call__(
            attn,
            hidden_states,
            key_mask,
            rotary,
        )


def hide_padding(denoiser: nn.Module) -> None:
    """Let a transformer of diffusers hide the tokens that the columns of its positions mark."""
    transformer: Any = denoiser
    positions = transformer.pos_embed
    positions.__class__ = PaddedPositions
    for module in denoiser.modules():
        if isinstance(module, Flux3Attention):
            module.set_processor(KeyMaskProcessor())  # type: ignore[arg-type]
