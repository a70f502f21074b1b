"""Tiny text encoders, tokenizers and VAEs of the real classes, from which tests put pipelines together."""

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from helpers.project import BASE

WORDS = [
    "photo",
    "of",
    "cat",
    "dog",
    "owl",
    "red",
    "blue",
    "green",
    "smiling",
    "sad",
    "face",
    "style",
    "house",
    "tree",
]
CLIP_WIDTH = 16


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(BASE, subfolder="tokenizer")


def clip_encoder(projection: bool = False, width: int = CLIP_WIDTH) -> torch.nn.Module:
    """CLIP's text encoder for that tokenizer; with a projection as pipelines of two encoders need it."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_attention_heads=2,
        num_hidden_layers=3, max_position_embeddings=tokenizer.model_max_length, projection_dim=width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_tokenizer(length: int = 16) -> T5TokenizerFast:
    """A unigram tokenizer that knows some words and all ASCII letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(f"\u2581{word}", -3.0) for word in WORDS]
    pieces += [(chr(code), -6.0) for code in range(33, 127)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(tokenizer_object=tokenizer, model_max_length=length, extra_ids=0)


def t5_encoder(width: int = 32) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=2 * width, num_heads=2, num_layers=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def umt5_encoder(width: int = 32) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=2 * width, num_heads=2, num_layers=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return UMT5EncoderModel(config).eval()


def wan_vae(**more: object) -> AutoencoderKLWan:
    """A VAE of videos that makes cells of 8 pixels and 4 frames; `more`: as Wan 2.2's 5B has it, of 16 pixels."""
    options = {"z_dim": 16, "base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, **more}
    return AutoencoderKLWan(temperal_downsample=[False, True, True], **options).eval()


def image_vae(channels: int, **more: object) -> AutoencoderKL:
    """A VAE that makes cells of 4 pixels."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8), in_channels=3, out_channels=3, latent_channels=channels, norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, **more,
    ).eval()  # fmt: skip
