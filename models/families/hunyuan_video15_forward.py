"""The pass through HunyuanVideo 1.5's transformer, without waiting for the device.

diffusers puts the tokens that count before the others, whose number it reads from the device. Tokens
of text have no positions, so their order changes nothing. Here they stay where they are.
"""

from types import MethodType
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

TEXT, GLYPHS, IMAGE = range(3)
"""Kinds of tokens that condition the video, each with an embedding."""


class JointProcessor(FluxAttnProcessor):
    """FLUX.1's attention over text and video, in which positions are those of the video alone.

    It hides keys alone; see chroma_attention.py."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Attend. `attention_mask`: (B, L), true for tokens of text that count; None: all do."""
        num_tokens = encoder_hidden_states.shape[1]
        cosines, sines = image_rotary_emb
        not_rotated = cosines.new_ones(num_tokens, cosines.shape[1])
        zeros = torch.zeros_like(not_rotated)
        rotary = (
            torch.cat([not_rotated, cosines]),
            torch.cat([zeros, sines]),
        )
        key_mask = None
        if attention_mask is not None:
            video_mask = attention_mask.new_ones(hidden_states.shape[:2])
            mask = torch.cat([attention_mask, video_mask], 1)
            key_mask = mask[:, None, None]
        return super().__call__(
            attn,
            hidden_states,
            encoder_hidden_states,
            key_mask,
            rotary,  # type: ignore[arg-type]
        )


class RefinerProcessor(AttnProcessor2_0):
    """Attention over text that hides keys alone."""

    def __call__(  # type: ignore[override]
        self, attn: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Attend. `attention_mask`: (B, 1, L, L)."""
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, :1]  # the first query is a token that counts
        return super().__call__(attn, hidden_states, attention_mask=attention_mask, **options)


def replace_forward(denoiser: Any) -> None:
    """Replace the forward function of a transformer, and its attention."""
    for name, module in denoiser.named_modules():
        if isinstance(module, Attention):
            attention: Any = module
            attention.head_dim = attention.inner_dim // attention.heads  # as FLUX.1's has it
            processor: Any = RefinerProcessor()
            if name.startswith("transformer_blocks"):
                processor = JointProcessor()
            attention.set_processor(processor)
    denoiser.forward = MethodType(forward, denoiser)


def forward(
    denoiser: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    has_glyphs: bool = True,
    **inputs: Any,
) -> tuple[Tensor]:
    """Return the prediction, as diffusers does with return_dict=False, for the same `inputs`.

    Masks that are None: all tokens count. Images are hidden if all their embeddings are 0; there are
    none if these are None. `has_glyphs`: False if glyphs are padding in all samples."""
    text_mask = inputs["encoder_attention_mask"]
    glyph_embedder = denoiser.context_embedder_2
    glyph_embeds = in_dtype_of(glyph_embedder.norm, inputs["encoder_hidden_states_2"])
    glyphs = glyph_embedder(glyph_embeds)
    text = denoiser.context_embedder(encoder_hidden_states, timestep, text_mask)
    tokens = [with_kind(denoiser, text, TEXT)]
    masks = [text_mask]
    if has_glyphs:
        tokens.append(with_kind(denoiser, glyphs, GLYPHS))
        masks.append(inputs["encoder_attention_mask_2"])
    else:
        tokens[0] = tokens[0] + 0 * glyphs.mean()  # all adapters get a gradient in each step
    image_embeds = inputs["image_embeds"]
    if image_embeds is not None:
        image_embedder = denoiser.image_embedder
        image = image_embedder(in_dtype_of(image_embedder.norm_in, image_embeds))
        tokens.append(with_kind(denoiser, image, IMAGE))
        masks.append(image_mask(image_embeds))
    context = torch.cat(tokens, 1)
    mask = joined_mask(masks, tokens)
    return (denoise(denoiser, hidden_states, timestep, context, mask),)


def in_dtype_of(norm: nn.Module, embeds: Tensor) -> Tensor:
    """Return embeddings in the dtype of a norm, which autocast on the CPU does not convert."""
    parameters = norm.parameters()
    weight = next(parameters)
    return embeds.to(weight.dtype)


def with_kind(denoiser: Any, tokens: Tensor, kind: int) -> Tensor:
    """Add the embedding of their kind to tokens."""
    kinds = torch.full(tokens.shape[:2], kind, device=tokens.device)
    return tokens + denoiser.cond_type_embed(kinds)


def image_mask(image_embeds: Tensor) -> Tensor:
    """Return (B, L), false if there is no image."""
    return (image_embeds != 0).any().expand(image_embeds.shape[:2])


def joined_mask(masks: list[Tensor | None], tokens: list[Tensor]) -> Tensor | None:
    """Return the masks of all tokens as one; None if all count."""
    if all(mask is None for mask in masks):
        return None
    parts = []
    for mask, part in zip(masks, tokens, strict=True):
        if mask is None:
            mask = torch.ones(
                part.shape[:2],
                dtype=torch.bool,
                device=part.device,
            )
        parts.append(mask.bool())
    return torch.cat(parts, 1)


def denoise(
    denoiser: Any, latents: Tensor, timestep: Tensor, context: Tensor, mask: Tensor | None
) -> Tensor:
    """Return the prediction for latents, given the tokens that condition them."""
    embedding = denoiser.time_embed(timestep)
    rotary = denoiser.rope(latents)
    video = denoiser.x_embedder(latents)
    for block in denoiser.transformer_blocks:
        video, context = block(video, context, embedding, mask, rotary)
    normalized = denoiser.norm_out(video, embedding)
    video = denoiser.proj_out(normalized)
    sides = latents.shape[2:]
    return unpatched(video, sides, patch_sizes(denoiser))


def patch_sizes(denoiser: nn.Module) -> tuple[int, int, int]:
    """Return the latents per token along frames, height and width."""
    config: Any = denoiser.config
    return config.patch_size_t, config.patch_size, config.patch_size


def unpatched(tokens: Tensor, sides: torch.Size, patch: tuple[int, int, int]) -> Tensor:
    """Return tokens (B, L, channels * patch) as latents (B, channels, *sides)."""
    numbers = []
    for side, size in zip(sides, patch, strict=True):
        numbers.append(side // size)
    cells = tokens.unflatten(1, numbers)
    cells = cells.unflatten(-1, (-1, *patch))
    axes = cells.permute(0, 4, 1, 5, 2, 6, 3, 7)
    columns = axes.flatten(6, 7)
    rows = columns.flatten(4, 5)
    return rows.flatten(2, 3)
