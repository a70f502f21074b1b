"""Latents as the tokens of a transformer, and the positions of these tokens (FLUX.1 and others).

A token is a cell of 2 x 2 latents, all channels of the cell in a row."""

import torch
from torch import Tensor

PATCH = 2
"""Side of a cell in latents."""


def pack(latents: Tensor, patch: int = PATCH) -> Tensor:
    """Return tokens (B, h w / patch^2, C patch^2) of latents (B, C, h, w), row by row.

    A token has the channels first, then the rows of its cell."""
    cells = latents.unflatten(3, (-1, patch))
    cells = cells.unflatten(2, (-1, patch))  # (B, C, rows, patch, columns, patch)
    cells = cells.permute(0, 2, 4, 1, 3, 5)
    tokens = cells.flatten(3)  # (B, rows, columns, C patch^2)
    return tokens.flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int, patch: int = PATCH) -> Tensor:
    """Return latents (B, C, height, width) of tokens as `pack` makes them.

    `height` and `width` must be multiples of `patch`."""
    rows = height // patch
    columns = width // patch
    cells = tokens.unflatten(2, (-1, patch, patch))
    cells = cells.unflatten(1, (rows, columns))  # (B, rows, columns, C, patch, patch)
    cells = cells.permute(0, 3, 1, 4, 2, 5)
    # (B, C, rows, patch, columns, patch)
    latents = cells.flatten(4)
    return latents.flatten(2, 3)


def image_ids(
    height: int, width: int, device: torch.device, axes: int = 3, image: int = 0
) -> Tensor:
    """Return the positions (height width, axes) of the tokens of a grid, row by row.

    Axis 0 is `image`, axis 1 the row, axis 2 the column, and other axes are 0. Text tokens are at 0 on
    all axes."""
    ids = torch.zeros(height, width, axes, device=device)
    ids[..., 0] = image
    rows = torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    ids[..., 1] = rows[:, None]
    ids[..., 2] = columns
    return ids.flatten(0, 1)
