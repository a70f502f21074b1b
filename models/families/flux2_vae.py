"""Families with FLUX.2's VAE, whose latents are denoised in cells of 2 x 2."""

from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from models.families.transformer_family import TransformerFamily

CELL = 2
"""Side of a cell in latents of the VAE."""
OF_CHANNELS = (1, -1, 1, 1)
"""Shape of one number per channel."""


class Flux2VaeFamily(TransformerFamily):
    """A transformer over cells of latents of FLUX.2's VAE.

    Raw latents are ComfyUI's, and those that are denoised: cells of 2 x 2 as channels, normalized
    by the VAE's statistics. A token is a cell. The four latents of a cell follow each other, for one
    channel of the VAE after another."""

    latent_channels = 128
    vae_class = "AutoencoderKLFlux2"
    file_prefixes: ClassVar = {}
    patch_size = 1
    variance_offset: ClassVar[float | None] = None
    """Number added to the variances before their root is taken; None: that of the VAE's config."""

    @property
    def latent_step(self) -> int:
        vae_step = super().latent_step
        return CELL * vae_step

    def encode_media(self, encoders: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = super().encode_media(encoders, pixels)
        mean_cells = pixel_unshuffle(mean, CELL)
        deviation_cells = pixel_unshuffle(deviation, CELL)
        vae_mean, vae_deviation = self.vae_statistics(encoders.vae)
        centered_cells = mean_cells - vae_mean
        normalized_mean = centered_cells / vae_deviation
        normalized_deviation = deviation_cells / vae_deviation
        return (
            normalized_mean,
            normalized_deviation,
        )

    def decode_media(self, encoders: Any, latents: Tensor) -> Tensor:
        vae_mean, vae_deviation = self.vae_statistics(encoders.vae)
        cells = latents * vae_deviation + vae_mean
        vae_latents = pixel_shuffle(cells, CELL)
        return super().decode_media(encoders, vae_latents)

    def normalize(self, latents: Tensor) -> Tensor:
        return latents  # they were normalized before they were stored

    def vae_statistics(self, vae: Any) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the VAE's latents in cells, (1, C, 1, 1).

        They are the running statistics of its batch normalization. A family overrides this if those of
        its VAE have another order of channels."""
        offset = self.variance_offset
        if offset is None:
            offset = vae.config.batch_norm_eps
        statistics = vae.bn
        variance = statistics.running_var + offset
        deviation = variance.sqrt()
        return (
            statistics.running_mean.view(OF_CHANNELS),
            deviation.view(OF_CHANNELS),
        )
