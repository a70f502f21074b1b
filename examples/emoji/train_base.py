"""Trains the first embedded base model: a tiny but real Stable Diffusion pipeline that draws Noto
emoji.

Run once on a CPU; its result is committed as `examples/emoji/base`:

    npm install --prefix WORK emoji-datasource-google emoji-datasource-twitter
    python examples/emoji/train_base.py --work WORK

First it trains the autoencoder, which it keeps in WORK for the other base model. Then it trains the
tokenizer (a byte-pair encoding of the captions), and text encoder and UNet together, on the Noto
images of three categories.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from autoencoder import encode, load_or_train_autoencoder, normalize_latents
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from emoji_source import Emoji, load_pixels, read_emoji
from pretraining import (
    BatchLoss,
    TrainingPlan,
    draw_rows,
    minimize,
    parse_arguments,
    print_sizes,
    save_base,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCALING_FACTOR = 0.18215
"""As in SD 1.5, so that a forgotten factor shows here too."""
MAX_TOKENS = 24
START, END = "<|startoftext|>", "<|endoftext|>"
BATCH_SIZE, PEAK_RATE = 48, 2e-3
MAX_LEVEL_WEIGHT = 20
"""Limit of the loss weight 1 / alpha. At 16x16 latents the noisy levels decide what is drawn."""
STEPS, MIRRORED_STEPS = 6000, 4000
"""The first steps draw mirrored emoji too, which teaches shapes; then each caption has one picture."""


def main() -> None:
    options = parse_arguments(__doc__.splitlines()[0], "base", STEPS)
    torch.manual_seed(0)
    emoji = read_emoji(options.work / "node_modules", "google")
    autoencoder = load_or_train_autoencoder(options.work, options.autoencoder_steps)
    normalize_latents(autoencoder, load_pixels(emoji), SCALING_FACTOR)
    tokenizer = train_tokenizer([item.caption for item in emoji], options.work / "tokenizer")
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=autoencoder, text_encoder=build_text_encoder(tokenizer), tokenizer=tokenizer,
        unet=build_unet(), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    print_sizes(pipeline)
    train_denoiser(pipeline, emoji, options.steps, options.work / "snapshot")
    save_base(pipeline, emoji, options.out, draw)


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(56, 96, 128), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=96, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def train_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """Train a byte-pair encoding until each word of the captions is one token.

    The trainer of the tokenizers library is not deterministic, and a training that continues needs
    the same ids. So the encoding is read from `folder` if it is there."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if vocabulary.exists():
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=MAX_TOKENS)
    encoding = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    encoding.normalizer = normalizers.Lowercase()
    encoding.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.'!?-"
    trainer = trainers.BpeTrainer(
        vocab_size=4000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=[*letters, *(f"{letter}</w>" for letter in letters)],
        special_tokens=[START, END],
    )  # fmt: skip
    encoding.train_from_iterator(captions, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    encoding.model.save(str(folder))
    return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=MAX_TOKENS)


def train_denoiser(
    pipeline: StableDiffusionPipeline, emoji: list[Emoji], steps: int, snapshot: Path
) -> None:
    """Train text encoder and UNet with a weighted epsilon MSE; their moving average is the result."""
    unet, text_encoder, scheduler = pipeline.unet, pipeline.text_encoder, pipeline.scheduler
    unet.to(memory_format=torch.channels_last)
    pixels = load_pixels(emoji)
    latents = torch.stack([encode(pipeline.vae, pixels), encode(pipeline.vae, pixels.flip(3))])
    latents = latents * SCALING_FACTOR  # (flip, N, 4, 16, 16)
    print(f"latents: mean {latents.mean():.4f} std {latents.std():.4f}", flush=True)
    tokens = tokenize(pipeline.tokenizer, [*(item.caption for item in emoji), ""])
    parameters = [*text_encoder.parameters(), *unet.parameters()]
    weights = (1 / scheduler.alphas_cumprod).clamp(max=MAX_LEVEL_WEIGHT)
    weights /= weights.mean()
    state_file = snapshot.with_suffix(".pt")
    plan = TrainingPlan("unet", steps, PEAK_RATE, 0.999, 0.01, state_file)

    def batch_loss(step: int) -> BatchLoss:
        index, flip, caption = draw_rows(len(emoji), BATCH_SIZE, step < MIRRORED_STEPS)
        noise = torch.randn(BATCH_SIZE, *latents.shape[2:])
        timestep = torch.randint(1000, (BATCH_SIZE,))
        noisy = scheduler.add_noise(latents[flip, index], noise, timestep)
        prediction = unet(noisy, timestep, text_encoder(tokens[caption])[0]).sample
        errors = F.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3))
        return BatchLoss((errors * weights[timestep]).mean(), errors.mean())

    minimize(plan, parameters, batch_loss, lambda: save_base(pipeline, emoji, snapshot, draw))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return (N, MAX_TOKENS) token ids."""
    tokens = tokenizer(
        captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    return tokens.input_ids


@torch.no_grad()
def draw(pipeline: StableDiffusionPipeline, captions: list[str]) -> Tensor:
    """Return (N, 3, 64, 64) in [-1, 1], drawn with classifier-free guidance."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        captions, num_inference_steps=30, guidance_scale=3.0, output_type="pt", height=64, width=64,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return images * 2 - 1


if __name__ == "__main__":
    main()
