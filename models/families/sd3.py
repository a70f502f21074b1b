"""Stable Diffusion 3 and 3.5: a transformer over image and text tokens (Esser et al. 2024, arXiv
2403.03206), with two CLIP text encoders and, unless the folder has none, T5.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.base import base_metadata
from models.checkpoint_files import CLIP_G, CLIP_L, T5
from models.families.transformer_family import ATTENTION, MLP, PooledTextFamily, counts, pooled_rows
from models.layer_names.transformers import SD3

T5_TOKENS = 256  # the pipeline's default


class StableDiffusion3(PooledTextFamily):
    """Conditioning is the tokens of both CLIPs side by side, filled up with zeros to T5's width,
    and after them T5's.

    ComfyUI has as many of T5's as the caption, and 77 at least. All count, and the model has no mask: captions of other
    lengths are in other batches."""

    name = "sd3"
    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    denoiser_class = "SD3Transformer2DModel"
    text = (
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    )
    unused = ("feature_extractor", "image_encoder")
    in_file: ClassVar = {
        **PooledTextFamily.in_file,
        "text_encoder": (CLIP_L,),
        "text_encoder_2": (CLIP_G,),
        "text_encoder_3": (T5,),
    }
    latent_shift, latent_scale = 0.0609, 1.5305
    names = SD3
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|{MLP}",
        "all": r".*",
    }

    @classmethod
    def holds(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return {
            "joint_blocks.0.x_block.attn.qkv.weight",
            "pos_embed",
            "y_embedder.mlp.0.weight",
        } <= shapes.keys()

    def pixel_step(self) -> int:
        return self.latent_step() * self.denoiser_config["patch_size"]

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        device = encoders.text_encoder.device
        if (
            encoders.text_encoder_3 is None
        ):  # the pipeline asks the denoiser, which is not here, for T5's width
            clips = [
                encoders._get_clip_prompt_embeds(captions, 1, device, None, which)
                for which in (0, 1)
            ]
            clip, pooled = (torch.cat(both, -1) for both in zip(*clips, strict=True))
            embeds = nn.functional.pad(clip, (0, self._width - clip.shape[-1], 0, T5_TOKENS))
        else:
            embeds, _, pooled, _ = encoders.encode_prompt(
                captions, None, None, device, 1, False, max_sequence_length=T5_TOKENS
            )
        return pooled_rows(embeds, pooled)

    def token_counts(self, captions: list[str]) -> tuple[list[int], int]:
        both = self._load("tokenizer", "tokenizer_3")  # what CLIP does not see, T5 may
        if both.tokenizer_3 is None:
            return counts(both.tokenizer, captions, both.tokenizer.model_max_length)
        return counts(both.tokenizer_3, captions, T5_TOKENS)

    def cond_bytes(self) -> int:
        tokens = self.counting_tokenizer.model_max_length + T5_TOKENS
        return (tokens * self._width + self._pooled_width) * torch.float32.itemsize

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Tensor]
    ) -> Tensor:
        return denoiser(
            noisy,
            timestep=timestep,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        config: Any = denoiser.config
        version = (
            "m"
            if config.qk_norm is None
            else "5-medium"
            if config.dual_attention_layers
            else "5-large"
        )
        return base_metadata(f"sd3-{version}", f"stable-diffusion-3-{version}")


FAMILY = StableDiffusion3
