"""Attention of Chroma in which padding is hidden from all tokens, and sees the others itself."""

from typing import Any

from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn


class KeyMaskProcessor(FluxAttnProcessor):
    """Hides keys alone.

    diffusers' mask also hides all keys from the queries of padding. For such rows, fused kernels of
    several CUDA versions return NaN, which the next layer spreads. Their results are not used, so
    the other rows stay as they are (pytorch issues 103963 and 110213)."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Attend. `attention_mask`: (B, 1, L, L), the text before the image."""
        key_mask = attention_mask
        if attention_mask is not None:
            key_mask = attention_mask[:, :, -1:]  # the last query is a token of the image
        return super().__call__(
            attn,
            hidden_states,
            encoder_hidden_states,  # type: ignore[arg-type]
            key_mask,
            image_rotary_emb,
        )


def hide_keys_alone(denoiser: nn.Module) -> None:
    """Replace the attention processors of a Chroma transformer."""
    for module in denoiser.modules():
        if isinstance(module, FluxAttention):
            module.set_processor(KeyMaskProcessor())  # type: ignore[arg-type]
