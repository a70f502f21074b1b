"""FLUX.1 Fill (Black Forest Labs 2024): FLUX.1 dev that paints the part of an image that a mask shows."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.base import base_metadata
from models.families.flux1 import Flux1, is_flux1_file
from models.families.inpainting import INPAINT_MASK, InpaintingFamily
from models.families.packing import PATCH, pack, unpack


class Flux1Fill(InpaintingFamily, Flux1):
    """FLUX.1 Fill. A token has the noisy latents, the masked image and the mask's pixels, in this order."""

    undistilled_model = ""
    name = "flux1_fill"
    pipelines = ("FluxFillPipeline",)
    unused_components = ()
    comfy_nodes = None  # type: ignore[assignment]

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return is_flux1_file(shapes, paints_masks=True)

    @property
    def token_channels(self) -> int:
        mask_channels = self.latent_step**2
        channels = 2 * self.latent_channels + mask_channels
        return channels * PATCH**2

    def find_source(self) -> str:
        return "black-forest-labs/FLUX.1-Fill-dev"

    def mask_channels(self, masks: Tensor) -> Tensor:
        """Return a channel for each pixel of a latent."""
        *_, height, width = masks.shape
        size = (
            height // self.latent_step,
            width // self.latent_step,
        )
        cells = pack(masks, self.latent_step)
        channels = cells.transpose(1, 2)
        return channels.unflatten(2, size)

    def mask_pixels(self, channels: Tensor) -> Tensor:
        *_, rows, columns = channels.shape
        cells = channels.flatten(2)
        cells = cells.transpose(1, 2)
        return unpack(
            cells,
            rows * self.latent_step,
            columns * self.latent_step,
            self.latent_step,
        )

    def image_tokens(self, noisy: Tensor, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        tokens, positions = super().image_tokens(noisy, cond)
        masked_image = self.masked_latents(cond, noisy)
        mask = cond[INPAINT_MASK].to(noisy.dtype)
        parts = [
            tokens,
            pack(masked_image),
            pack(mask),
        ]
        all_parts = torch.cat(parts, 2)
        return all_parts, positions

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return base_metadata("flux1", "flux-1-fill-dev")


FAMILY = Flux1Fill
