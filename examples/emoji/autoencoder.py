"""The autoencoder of the two base models, trained on all emoji and on prints of them in random
colors.

Like the autoencoders of real models, they have seen more than the denoisers draw. The inks and
colors of the demos' styles are not among the random ones except by chance.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from emoji_source import Emoji, load_pixels, read_emoji, to_tensor
from pretraining import BatchLoss, TrainingPlan, minimize
from restyle import Blueprint, Color, ScreenPrint, over_white
from torch import Tensor

BATCH_SIZE = 8
PEAK_RATE = 1.5e-3
KL_WEIGHT = 2e-4
PRINTED_SHARE, DRAWN_SHARE = 0.35, 0.25
"""Share of the emoji that are added as screen prints and as blueprints."""


def build_autoencoder() -> AutoencoderKL:
    """Return an autoencoder with 4 latent channels, as Stable Diffusion has it, at 1/4 of the size."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 80),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def autoencoder_images(emoji: list[Emoji]) -> Tensor:
    """Return (N, 3, 64, 64): each emoji on white, and some of them printed in random colors."""
    random = np.random.default_rng(0)

    def color(low: int = 0, high: int = 256) -> Color:
        red, green, blue = (int(value) for value in random.integers(low, high, 3))
        return red, green, blue

    images = []
    for item in emoji:
        image = item.image()
        images.append(over_white(image))
        draw = random.random()
        if draw < PRINTED_SHARE:
            inks = sorted((color() for _ in range(int(random.integers(2, 6)))), key=luminance)
            style = ScreenPrint(tuple(inks), color(), inks[0], 9, smoothing=1, thresholds=None)
            images.append(style(image))
        elif draw < PRINTED_SHARE + DRAWN_SHARE:
            style = Blueprint(
                color(150), color(), color(0, 160), outline_width=5, line_width=3, blur=2,
                threshold=38,
            )  # fmt: skip
            images.append(style(image))
    return torch.stack([to_tensor(image) for image in images])


def all_emoji(modules: Path) -> list[Emoji]:
    """Return the emoji of all categories, in both designs."""
    return [*read_emoji(modules, "google", None), *read_emoji(modules, "twitter", None)]


def luminance(color: Color) -> float:
    red, green, blue = color
    return 0.3 * red + 0.59 * green + 0.11 * blue


def train_autoencoder(
    autoencoder: AutoencoderKL, pixels: Tensor, steps: int, state_file: Path
) -> None:
    """Train an autoencoder in place: L1 + L2 + L1 of the gradients, and a small KL term."""

    plan = TrainingPlan(
        "autoencoder", steps, PEAK_RATE, decay=0.998, weight_decay=0.0, state_file=state_file
    )

    def batch_loss(_step: int) -> BatchLoss:
        batch = pixels[torch.randint(len(pixels), (BATCH_SIZE,))]
        is_flipped = torch.rand(BATCH_SIZE, 1, 1, 1) < 0.5
        batch = torch.where(is_flipped, batch.flip(3), batch)
        posterior = autoencoder.encode(batch).latent_dist
        decoded = autoencoder.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        error = decoding_error(decoded, batch)
        return BatchLoss(error + KL_WEIGHT * kl, error)

    minimize(plan, list(autoencoder.parameters()), batch_loss)


def decoding_error(decoded: Tensor, target: Tensor) -> Tensor:
    """Return L1 + L2 of the pixels, and half the L1 of their gradients."""
    error = decoded - target
    return error.abs().mean() + error.square().mean() + 0.5 * gradient_error(decoded, target)


def gradient_error(decoded: Tensor, target: Tensor) -> Tensor:
    """Return the L1 error of the differences of neighboring pixels, which keeps edges sharp."""
    error = decoded - target
    across = error[..., :, 1:] - error[..., :, :-1]
    down = error[..., 1:, :] - error[..., :-1, :]
    return across.abs().mean() + down.abs().mean()


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Encode (N, 3, 64, 64) pixels to the mean of their latents, (N, C, 16, 16), not scaled."""
    return torch.cat([autoencoder.encode(part).latent_dist.mean for part in pixels.split(64)])


@torch.no_grad()
def psnr(autoencoder: AutoencoderKL, pixels: Tensor) -> float:
    """Return the mean peak signal-to-noise ratio of decoded images in dB."""
    ratios = []
    for part in pixels.split(64):
        decoded = autoencoder.decode(autoencoder.encode(part).latent_dist.mean).sample
        squared_error = (decoded.clamp(-1, 1) - part).square().mean((1, 2, 3))
        ratios.append(10 * (4 / squared_error).log10())
    return torch.cat(ratios).mean().item()


@torch.no_grad()
def normalize_latents(
    autoencoder: AutoencoderKL, pixels: Tensor, scale: float, shift: float | None = None
) -> None:
    """Change quant_conv and post_quant_conv so that each scaled channel has mean 0 and deviation 1.

    Pipelines have one shift and one scale for all channels: scaled = (latents - shift) * scale."""
    autoencoder.register_to_config(scaling_factor=scale, shift_factor=shift)
    shift = shift or 0.0
    latents = encode(autoencoder, pixels)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    gain = 1 / (scale * std)
    channels = autoencoder.config.latent_channels
    quant, post_quant = autoencoder.quant_conv, autoencoder.post_quant_conv
    # first the decoder's side, which must see the old latents: old = (new - shift) / gain + mean
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ (mean - shift / gain)
    post_quant.weight /= gain[None, :, None, None]
    quant.weight[:channels] *= gain[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) * gain + shift
    quant.bias[channels:] += 2 * gain.log()  # the other half of the moments is the log variance


def load_or_train_autoencoder(work: Path, steps: int) -> AutoencoderKL:
    """Return the autoencoder in `work`, trained now unless an earlier run did."""
    folder = work / "autoencoder"
    if not folder.exists():
        modules = work / "node_modules"
        autoencoder = build_autoencoder()
        count = sum(parameter.numel() for parameter in autoencoder.parameters())
        print(f"autoencoder: {count:,} parameters", flush=True)
        train_autoencoder(
            autoencoder, autoencoder_images(all_emoji(modules)), steps, work / "autoencoder.pt"
        )
        ratio = psnr(autoencoder, load_pixels(read_emoji(modules, "google")))
        print(f"autoencoder: PSNR {ratio:.2f} dB", flush=True)
        autoencoder.save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder)
