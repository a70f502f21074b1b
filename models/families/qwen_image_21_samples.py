"""Qwen-Image 2.1 in training: each sample of a batch is computed as it would be alone.

diffusers' model places the image behind the padding of the captions, so a prediction would depend on the
longest caption of the batch. Its forward pass also waits for the device, from which it reads masks.
The forward pass here is for a text and one image. Drawing uses that of diffusers.
"""

from typing import Any, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21Attention,
    QwenImage21AttnProcessor,
    QwenImage21Transformer2DModel,
)
from torch import Tensor, nn

NUM_AXES = 3
Rotation = tuple[Tensor, Tensor]
"""Cosine and sine (B, L, 1, width / 2) of the angles by which pairs of channels are rotated."""


class SampleTransformer(QwenImage21Transformer2DModel):
    """Computes each sample as alone, if it is given the size of the image."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        image_size: tuple[int, int] | None = None,
        **options: Any,
    ) -> Any:
        """Return the image's tokens. `image_size`: its rows and columns; None: as diffusers does.

        `encoder_hidden_states_mask`: (B, L), true for tokens of captions. None: there is no padding."""
        if image_size is None:
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                timestep,
                encoder_hidden_states_mask=encoder_hidden_states_mask,
                **options,
            )
        text = self.txt_in(encoder_hidden_states)
        image = self.img_in(hidden_states)
        tokens = torch.cat([text, image], 1)
        num_text = text.shape[1]
        times = timestep.to(tokens.dtype)
        is_image = None
        if self.config["causal_condition"]:
            text_time = times.new_zeros(1)
            times = torch.cat([times, text_time])
            order = torch.arange(tokens.shape[1], device=tokens.device)
            is_image = order >= num_text
        embedding = self.time_text_embed(times, tokens)
        modulation = self.modulation(embedding)
        mask = encoder_hidden_states_mask
        positions = token_positions(text, mask, image_size)
        rotation = rotation_at(
            positions,
            self.pos_embed.axes_dim,
            self.pos_embed.theta,
        )
        shown_keys = None
        if mask is not None:
            image_mask = mask.new_ones(image.shape[:2])
            shown_keys = torch.cat([mask, image_mask], 1)
            shown_keys = shown_keys[:, None, None]
        for block in self.transformer_blocks:
            tokens = block(
                hidden_states=tokens,
                modulation=modulation,
                rotary_emb=rotation,
                target_token_mask=is_image,
                segments=[(0, num_text, True)],
                key_valid=shown_keys,
            )
        tokens = self.norm_out(tokens, embedding, is_image)
        return self.proj_out(tokens[:, num_text:])


# diffusers stores a model and its pipeline by these names
SampleTransformer.__name__ = QwenImage21Transformer2DModel.__name__
SampleTransformer.__module__ = QwenImage21Transformer2DModel.__module__


class SampleProcessor(QwenImage21AttnProcessor):
    """Attention of a text and an image, rotated for each sample of a batch."""

    def __call__(  # type: ignore[override]
        self,
        attn: QwenImage21Attention,
        hidden_states: Tensor,
        rotary_emb: Any = None,
        segments: list[tuple[int, int, bool]] | None = None,
        key_valid: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if not isinstance(rotary_emb, tuple):  # of diffusers' forward pass
            return super().__call__(
                attn,
                hidden_states,
                rotary_emb=rotary_emb,
                segments=segments,
                key_valid=key_valid,
                **options,
            )
        assert segments is not None
        ((_, num_text, _),) = segments
        heads = (attn.heads, -1)
        value = attn.to_v(hidden_states).unflatten(-1, heads)
        query = attn.to_q(hidden_states).unflatten(-1, heads)
        query = attn.norm_q(query).to(value.dtype)
        query = rotated(query, rotary_emb)
        key = attn.to_k(hidden_states).unflatten(-1, heads)
        key = attn.norm_k(key).to(value.dtype)
        key = rotated(key, rotary_emb)
        # no mask: padding comes after the text, whose tokens see only earlier ones
        text = dispatch_attention_fn(
            query[:, :num_text],
            key[:, :num_text],
            value[:, :num_text],
            is_causal=True,
        )
        image = dispatch_attention_fn(
            query[:, num_text:],
            key,
            value,
            attn_mask=key_valid,
        )
        tokens = torch.cat([text, image], 1)
        projection, dropout = attn.to_out
        return dropout(projection(tokens.flatten(2)))


def token_positions(text: Tensor, mask: Tensor | None, image_size: tuple[int, int]) -> Tensor:
    """Return the positions (B, L, axes) of the tokens of texts (B, L, D) and of an image behind each.

    Token i of a text is at i on all axes. An image is behind its own text on the first axis, and around 0
    on the others."""
    batch_size, num_text, _ = text.shape
    device = text.device
    order = torch.arange(num_text, device=device).float()
    text_positions = order[None, :, None]
    text_positions = text_positions.expand(batch_size, -1, NUM_AXES)
    lengths = order.new_full((batch_size,), num_text)
    if mask is not None:
        lengths = mask.sum(1).float()
    num_rows, num_columns = image_size
    rows = centered(num_rows, device)
    columns = centered(num_columns, device)
    grid = torch.cartesian_prod(rows, columns)
    grid = grid.expand(batch_size, -1, -1)
    first_axis = lengths[:, None, None]
    first_axis = first_axis.expand(-1, num_rows * num_columns, 1)
    image_positions = torch.cat([first_axis, grid], 2)
    return torch.cat([text_positions, image_positions], 1)


def centered(count: int, device: torch.device) -> Tensor:
    """Return the positions of so many rows or columns around 0."""
    middle = count - count // 2
    return torch.arange(
        -middle,
        count - middle,
        dtype=torch.float32,
        device=device,
    )


def rotation_at(positions: Tensor, widths: list[int], base: float) -> Rotation:
    """Return the rotation at positions (B, L, axes). `widths`: the channels that each axis rotates."""
    angles = []
    for axis, width in enumerate(widths):
        channels = torch.arange(0, width, 2, device=positions.device)
        exponents = channels.float() / width
        frequencies = 1.0 / torch.pow(base, exponents)
        axis_positions = positions[..., axis, None]
        angles.append(axis_positions * frequencies)
    angle = torch.cat(angles, 2)
    angle = angle.unsqueeze(2)
    return angle.cos(), angle.sin()


def rotated(heads: Tensor, rotation: Rotation) -> Tensor:
    """Return queries or keys (B, L, heads, width) after the rotation of pairs of channels."""
    cosine, sine = rotation
    channel_pairs = heads.float().unflatten(-1, (-1, 2))
    first, second = channel_pairs.unbind(-1)
    new_first = first * cosine - second * sine
    new_second = first * sine + second * cosine
    pairs = torch.stack([new_first, new_second], -1)
    channels = pairs.flatten(-2)
    return channels.to(heads.dtype)


def compute_by_sample(denoiser: nn.Module) -> None:
    """Let a transformer of diffusers compute each sample as alone, if it is given an `image_size`."""
    transformer = cast(Any, denoiser)
    transformer.__class__ = SampleTransformer
    for block in transformer.transformer_blocks:
        block.attn.set_processor(SampleProcessor())
