"""Trains the embedded base model: a tiny but real Stable Diffusion pipeline that draws Noto emoji.

Run once on a CPU; its result is committed as `examples/emoji/base`:

    npm install --prefix WORK emoji-datasource-google emoji-datasource-twitter
    python examples/emoji/train_base.py --work WORK

Three stages: the autoencoder, kept in WORK so that an interrupted run need not repeat it (all Noto
and Twemoji images: like SD's own it has seen more than the denoiser draws), the tokenizer
(byte-pair encoding of the captions), then text encoder and UNet together (Noto images of three
categories only).
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from emoji_source import load_pixels, read_emoji, save_grid
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCALING_FACTOR = 0.18215  # SD 1.5's, so that a forgotten scale shows here as it would there
MAX_TOKENS = 24
START, END = "<|startoftext|>", "<|endoftext|>"
SAMPLES = (
    "grinning",
    "heart_eyes",
    "cat",
    "tiger",
    "fox_face",
    "turtle",
    "tropical_fish",
    "penguin",
    "pizza",
    "strawberry",
    "doughnut",
    "beer",
    "tulip",
    "cactus",
    "heart",
    "ghost",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder with node_modules; stages are kept here"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=4500)
    args = parser.parse_args()
    torch.manual_seed(0)
    modules = args.work / "node_modules"

    vae_dir = args.work / "vae"
    if not vae_dir.exists():
        images = [
            e
            for vendor in ("google", "twitter")
            for e in read_emoji(modules, vendor, categories=None)
        ]
        vae = train_vae(load_pixels(images), args.vae_steps)
        normalize_latents(vae, load_pixels(read_emoji(modules, "google")))
        vae.save_pretrained(vae_dir)
    vae = AutoencoderKL.from_pretrained(vae_dir)

    emoji = read_emoji(modules, "google")
    tokenizer = train_tokenizer([e.caption for e in emoji], args.work / "tokenizer")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )

    def save(text_encoder: nn.Module, unet: nn.Module, out: Path) -> None:
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        copy.deepcopy(pipeline).to(dtype=torch.float16).save_pretrained(out)
        shown = [next(e for e in emoji if e.name == name) for name in SAMPLES]
        samples = sample(pipeline, [e.caption for e in shown])
        save_grid([load_pixels(shown), samples], out.parent / f"{out.name}.png", zoom=1)

    pixels = load_pixels(emoji)
    models_ = build_text_encoder(tokenizer), build_unet()
    print(
        f"parameters: {[sum(p.numel() for p in m.parameters()) for m in (vae, *models_)]}",
        flush=True,
    )
    train_denoiser(
        models_,
        (vae, tokenizer, scheduler),
        (pixels, [e.caption for e in emoji]),
        args.steps,
        lambda text_encoder, unet: save(text_encoder, unet, args.work / "snapshot"),
    )
    save(*models_, args.out)


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=SCALING_FACTOR,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(56, 96, 128),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=96,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def train_vae(
    pixels: Tensor, steps: int, batch_size: int = 16, peak_lr: float = 1.5e-3
) -> AutoencoderKL:
    """KL autoencoder on (N, 3, 64, 64) images: L1 + L2 + a tiny KL term."""
    vae = build_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak_lr, weight_decay=0.0)
    log = Log("vae", steps)
    for step in range(steps):
        batch = random_flip(pixels[torch.randint(len(pixels), (batch_size,))])
        posterior = vae.encode(batch).latent_dist
        error = vae.decode(posterior.sample()).sample - batch
        reconstruction = error.abs().mean() + error.square().mean()
        loss = reconstruction + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        descend(loss, vae.parameters(), optimizer, peak_lr * cosine(step, steps, warmup=100))
        log(step, reconstruction)
    return vae


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Folds per-channel mean and std into quant_conv and post_quant_conv: the SD pipeline only
    knows one scale."""
    latents = encode(vae, pixels)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    gain = 1 / (SCALING_FACTOR * std)
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    # decoder first: it must see the old latents, z_old = z_new / gain + mean
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight /= gain[None, :, None, None]
    quant.weight[:4] *= gain[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) * gain
    quant.bias[4:] += 2 * gain.log()  # the other half of the moments is the log variance


def train_tokenizer(captions: list[str], out: Path) -> CLIPTokenizer:
    """CLIP-style byte-pair encoding; trained until the words of the captions are one token each."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.'!?-"
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=[*letters, *(f"{c}</w>" for c in letters)],
        special_tokens=[START, END],
    )
    bpe.train_from_iterator(captions, trainer)
    out.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(out))
    return CLIPTokenizer(
        str(out / "vocab.json"), str(out / "merges.txt"), model_max_length=MAX_TOKENS
    )


def train_denoiser(
    trained: tuple[nn.Module, nn.Module],
    frozen: tuple[AutoencoderKL, CLIPTokenizer, DDIMScheduler],
    examples: tuple[Tensor, list[str]],
    steps: int,
    snapshot: Callable[[nn.Module, nn.Module], None],
) -> None:
    """Trains text encoder and UNet in place with weighted epsilon MSE; leaves their moving average
    there."""
    text_encoder, unet = trained
    vae, tokenizer, scheduler = frozen
    pixels, captions = examples
    unet.to(memory_format=torch.channels_last)
    latents = (
        torch.stack([encode(vae, pixels), encode(vae, pixels.flip(3))]) * SCALING_FACTOR
    )  # (flip, N, 4, 16, 16)
    print(f"latents: mean {latents.mean():.4f} std {latents.std():.4f}", flush=True)
    tokens = tokenize(tokenizer, [*captions, ""])
    print(
        f"vocabulary {len(tokenizer)}, {(tokens != tokenizer.eos_token_id).sum(1).max() + 1} tokens at most",
        flush=True,
    )
    parameters = [*text_encoder.parameters(), *unet.parameters()]
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.99), fused=True
    )
    # as a velocity loss would weigh them, up to a limit: at 16x16 it is the noisy end that decides
    # what is drawn
    weights = (1 / scheduler.alphas_cumprod).clamp(max=20)
    weights /= weights.mean()
    log = Log("unet", steps)
    for step in range(steps):
        index = torch.randint(len(captions), (48,))
        target = torch.randn(48, *latents.shape[2:])
        timestep = torch.randint(1000, (48,))
        noisy = scheduler.add_noise(latents[torch.randint(2, (48,)), index], target, timestep)
        caption = torch.where(
            torch.rand(48) < 0.1, len(captions), index
        )  # the last one is the empty prompt
        prediction = unet(noisy, timestep, text_encoder(tokens[caption])[0]).sample
        errors = F.mse_loss(prediction, target, reduction="none").mean((1, 2, 3))
        loss = (errors * weights[timestep]).mean()
        descend(loss, parameters, optimizer, 2e-3 * cosine(step, steps, warmup=200))
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)
        log(step, errors.mean())
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            swap(parameters, averages)
            snapshot(text_encoder, unet)
            if step + 1 < steps:
                swap(parameters, averages)


@torch.no_grad()
def swap(parameters: list[Tensor], others: list[Tensor]) -> None:
    for parameter, other in zip(parameters, others, strict=True):
        kept = parameter.clone()
        parameter.copy_(other)
        other.copy_(kept)


def descend(loss: Tensor, parameters, optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One clipped optimizer step at learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(list(parameters), 1.0)
    optimizer.step()


def cosine(step: int, steps: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def random_flip(batch: Tensor) -> Tensor:
    return torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch.flip(3), batch)


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """(N, 3, 64, 64) -> raw latents (N, 4, 16, 16): the mean, unscaled."""
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels.split(64)])


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(N, MAX_TOKENS) token ids."""
    options = {
        "padding": "max_length",
        "truncation": True,
        "max_length": MAX_TOKENS,
        "return_tensors": "pt",
    }
    return tokenizer(captions, **options).input_ids


def sample(pipeline: StableDiffusionPipeline, captions: list[str], seed: int = 0) -> Tensor:
    """(N, 3, 64, 64) in [-1, 1] with classifier-free guidance."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(
        captions,
        num_inference_steps=30,
        guidance_scale=3.0,
        generator=generator,
        output_type="pt",
        height=64,
        width=64,
    ).images
    return images * 2 - 1


class Log:
    """Prints the mean loss and the seconds per step every hundred steps."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps = name, steps
        self.losses: list[float] = []
        self.start = time.perf_counter()

    def __call__(self, step: int, loss: Tensor) -> None:
        self.losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == self.steps:
            seconds = (time.perf_counter() - self.start) / (step + 1)
            mean = sum(self.losses) / len(self.losses)
            print(
                f"{self.name} step {step + 1}/{self.steps} loss {mean:.5f} {seconds:.3f} s/step",
                flush=True,
            )
            self.losses.clear()


if __name__ == "__main__":
    main()
