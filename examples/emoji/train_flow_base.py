"""Trains the second embedded base model: a tiny Z-Image pipeline (flow matching) that draws Noto
emoji.

Run once on a CPU; its result is committed as `examples/emoji/flow_base`. It needs the autoencoder
that train_base.py leaves in WORK, and trains it if there is none:

    npm install --prefix WORK emoji-datasource-google emoji-datasource-twitter
    python examples/emoji/train_flow_base.py --work WORK

Tokenizer, text encoder and transformer are trained on the same Noto images as the first base model.
"""

from pathlib import Path

import torch
from autoencoder import encode, load_or_train_autoencoder, normalize_latents
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
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
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

SCALING_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159
"""As in Z-Image, so that a forgotten factor shows here too."""
CAPTION_WIDTH = 128
BATCH_SIZE, PEAK_RATE = 32, 1.5e-3
STEPS, MIRRORED_STEPS = 19000, 8000
"""The first steps draw mirrored emoji too, which teaches shapes; then each caption has one picture."""
NUM_TIMESTEPS = 1000
SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""The part of Qwen3's template that a single message uses."""


def main() -> None:
    options = parse_arguments(__doc__.splitlines()[0], "flow_base", STEPS)
    torch.manual_seed(0)
    emoji = read_emoji(options.work / "node_modules", "google")
    autoencoder = load_or_train_autoencoder(options.work, options.autoencoder_steps)
    normalize_latents(autoencoder, load_pixels(emoji), SCALING_FACTOR, SHIFT_FACTOR)
    tokenizer = train_tokenizer([item.caption for item in emoji])
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(NUM_TIMESTEPS, shift=1.0),
        vae=autoencoder,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=build_transformer(autoencoder.config.latent_channels),
    )
    print_sizes(pipeline)
    train_denoiser(pipeline, emoji, options.steps, options.work / "flow_snapshot")
    save_base(pipeline, emoji, options.out, draw)


def build_transformer(latent_channels: int) -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        dim=192, n_layers=5, n_refiner_layers=1, n_heads=4, n_kv_heads=4,
        cap_feat_dim=CAPTION_WIDTH, in_channels=latent_channels, axes_dims=[16, 16, 16],
        axes_lens=[1024, 64, 64],
    )  # fmt: skip


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=CAPTION_WIDTH, intermediate_size=384,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, head_dim=32,
            max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip


def train_tokenizer(captions: list[str]) -> Qwen2Tokenizer:
    """Train a byte-level byte-pair encoding until each word of the captions is one token."""
    empty = Qwen2Tokenizer(extra_special_tokens=SPECIAL_TOKENS, model_max_length=1024)
    words = sorted({word for caption in captions for word in caption.replace(",", " ,").split()})
    texts = ["user\nassistant\n", *words, *(f" {word}" for word in words)]
    tokenizer = empty.train_new_from_iterator(texts, 4000, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def train_denoiser(
    pipeline: ZImagePipeline, emoji: list[Emoji], steps: int, snapshot: Path
) -> None:
    """Train text encoder and transformer with the MSE of the velocity; their moving average is the
    result."""
    transformer, text_encoder = pipeline.transformer, pipeline.text_encoder
    pixels = load_pixels(emoji)
    latents = torch.stack([encode(pipeline.vae, pixels), encode(pipeline.vae, pixels.flip(3))])
    latents = (latents - SHIFT_FACTOR) * SCALING_FACTOR  # (flip, N, 4, 16, 16)
    print(f"latents: mean {latents.mean():.4f} std {latents.std():.4f}", flush=True)
    tokens, masks = tokenize(pipeline.tokenizer, [*(item.caption for item in emoji), ""])
    parameters = [*text_encoder.parameters(), *transformer.parameters()]
    state_file = snapshot.with_suffix(".pt")
    plan = TrainingPlan("transformer", steps, PEAK_RATE, 0.999, 0.01, state_file)

    def batch_loss(step: int) -> BatchLoss:
        index, flip, caption = draw_rows(len(emoji), BATCH_SIZE, step < MIRRORED_STEPS)
        noise = torch.randn(BATCH_SIZE, *latents.shape[2:])
        sigma = torch.sigmoid(torch.randn(BATCH_SIZE))
        clean = latents[flip, index]
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        embeds = text_encoder(
            tokens[caption], attention_mask=masks[caption], output_hidden_states=True
        ).hidden_states[-2]
        embeds = [embed[mask] for embed, mask in zip(embeds, masks[caption], strict=True)]
        images = list(noisy.unsqueeze(2))  # each a video of one frame
        prediction = -torch.stack(transformer(images, 1 - sigma, embeds, return_dict=False)[0])
        loss = (prediction.squeeze(2) - (noise - clean)).square().mean()
        return BatchLoss(loss, loss)

    minimize(plan, parameters, batch_loss, lambda: save_base(pipeline, emoji, snapshot, draw))


def tokenize(tokenizer: Qwen2Tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Return (N, L) token ids and their mask, of captions in the chat template."""
    texts = []
    for caption in captions:
        messages = [{"role": "user", "content": caption}]
        texts.append(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    return batch.input_ids, batch.attention_mask.bool()


@torch.no_grad()
def draw(pipeline: ZImagePipeline, captions: list[str]) -> Tensor:
    """Return (N, 3, 64, 64) in [-1, 1], drawn with classifier-free guidance."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        list(captions), num_inference_steps=30, guidance_scale=2.0, output_type="pt", height=64,
        width=64, generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return images * 2 - 1


if __name__ == "__main__":
    main()
