"""Latents as the tokens of a transformer: cells of 2 x 2, all channels of a cell in a row (FLUX.1
and its kin)."""

import torch
from torch import Tensor

PATCH = 2


def pack(latents: Tensor, patch: int = PATCH) -> Tensor:
    """(B, C, h, w) -> (B, h w / patch^2, C patch^2), row by row; in a token, channels first, then
    rows of the cell."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpack(tokens: Tensor, height: int, width: int, patch: int = PATCH) -> Tensor:
    """The inverse of `pack`; `height` and `width` of the latents."""
    batch, _, depth = tokens.shape
    channels = depth // (patch * patch)
    cells = tokens.reshape(batch, height // patch, width // patch, channels, patch, patch)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def image_ids(height: int, width: int, device: torch.device, axes: int = 3) -> Tensor:
    """Position of each token of a grid of `height` x `width` tokens, (height width, axes): row on axis 1, column on
    axis 2, 0 elsewhere."""
    ids = torch.zeros(height, width, axes, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return ids.reshape(height * width, axes)
