"""Models that paint a part of an image: they are given the rest of it, and a mask of the part.

In a mask 1 is to be painted. Training masks are those of `data.masks`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.base import TensorLayout
from models.diffusers_family import DiffusersFamily
from models.families.unet_family import INPAINTING_CHANNELS, UNetFamily
from models.limits import PAINTED

MASKED_IMAGE = "masked_image"
"""Raw latents of the image, in which pixels to be painted are gray."""
INPAINT_MASK = "inpaint_mask"
"""The mask at the size of the latents."""


class InpaintingFamily(DiffusersFamily):
    """A mixin for families that paint a part of an image; it is the first of the base classes."""

    paints_masks = True
    sample_conditioning: ClassVar[tuple[str, ...]] = (MASKED_IMAGE, INPAINT_MASK)

    def mask_channels(self, masks: Tensor) -> Tensor:
        """Return masks (B, 1, H, W) of zeros and ones as the denoiser's channels (B, C, h, w)."""
        raise NotImplementedError

    def mask_pixels(self, channels: Tensor) -> Tensor:
        """Return the masks (B, 1, H, W) that have these channels."""
        raise NotImplementedError

    def encode_sample_conditioning(
        self, encoders: Any, pixels: Tensor, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        assert masks is not None  # paints_masks
        is_painted = masks >= PAINTED
        painted = is_painted.unsqueeze(1)
        gray_pixels = pixels.masked_fill(painted, 0)
        masked_image, _ = self.encode_media(encoders, gray_pixels)
        binary_masks = painted.to(torch.uint8)
        return {
            MASKED_IMAGE: masked_image,
            INPAINT_MASK: self.mask_channels(binary_masks),
        }

    def sample_layout(self, latents: tuple[int, ...]) -> dict[str, TensorLayout]:
        _, rows, columns = latents
        height = rows * self.latent_step
        width = columns * self.latent_step
        masks = torch.empty(1, 1, height, width, device="meta")
        channels = self.mask_channels(masks)
        _, *shape = channels.shape
        return {
            MASKED_IMAGE: TensorLayout(latents, torch.float32),
            INPAINT_MASK: TensorLayout(tuple(shape), torch.uint8),
        }

    def masked_latents(self, cond: dict[str, Any], noisy: Tensor) -> Tensor:
        """Return the normalized latents of the masked images, in the dtype of the noisy latents."""
        return self.normalize(cond[MASKED_IMAGE]).to(noisy.dtype)


class InpaintingUNet(InpaintingFamily, UNetFamily):
    """A UNet whose input has channels for noisy latents, mask and masked image, in this order."""

    num_input_channels = INPAINTING_CHANNELS

    def mask_channels(self, masks: Tensor) -> Tensor:
        """Return one value of each cell, as the pipelines scale masks."""
        step = self.latent_step
        return masks[..., ::step, ::step]

    def mask_pixels(self, channels: Tensor) -> Tensor:
        step = self.latent_step
        rows = channels.repeat_interleave(step, -1)
        return rows.repeat_interleave(step, -2)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        mask = cond[INPAINT_MASK].to(noisy.dtype)
        masked_image = self.masked_latents(cond, noisy)
        inputs = torch.cat([noisy, mask, masked_image], 1)
        return super().predict(
            denoiser,
            inputs,
            timestep,
            cond,
        )
