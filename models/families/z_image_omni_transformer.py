"""Z-Image omni in training: the branch of the SigLIP features computes in every pass.

diffusers' model leaves it out without control images. Then its adapters would get no gradients, for
which DDP waits, and FSDP's processes would gather other blocks than each other. Here it computes one
token without control images, whose product with zero changes nothing.
"""

from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import Tensor, nn

NUM_AXES = 3
"""Axes of a position."""
SIGLIP_LENGTHS = 9
"""Place of the numbers of SigLIP tokens among the arguments of _build_unified_sequence after the first."""


class OmniTransformer(ZImageTransformer2DModel):
    """Computes all layers in every pass."""

    def _build_unified_sequence(self, x: Tensor, *arguments: Any) -> Any:
        """WHEN: between the refiners and the other layers, where the branch also is in order."""
        has_siglip = arguments[SIGLIP_LENGTHS] is not None
        if not has_siglip:
            spare = self.spare_token(x)
            x = x + 0 * spare.sum()
        return super()._build_unified_sequence(x, *arguments)

    def spare_token(self, x: Tensor) -> Tensor:
        """Return the branch's output (1, 1, D) for one token, in the dtype of `x`."""
        width = self.config["siglip_feat_dim"]
        features = x.new_zeros(1, 1, width)
        token = self.siglip_embedder(features)
        position = torch.zeros(
            1,
            NUM_AXES,
            dtype=torch.int32,
            device=x.device,
        )
        rotation = self.rope_embedder(position)
        rotation = rotation[None]
        for block in self.siglip_refiner:
            token = block(token, None, rotation)
        return token.to(x.dtype)


# diffusers stores a model and its pipeline by these names
OmniTransformer.__name__ = ZImageTransformer2DModel.__name__
OmniTransformer.__module__ = ZImageTransformer2DModel.__module__


def compute_all_layers(denoiser: nn.Module) -> None:
    """Let a transformer of diffusers compute all its layers in every pass."""
    cast(Any, denoiser).__class__ = OmniTransformer
