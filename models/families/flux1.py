"""FLUX.1 dev and schnell (Black Forest Labs 2024): a transformer over image and text tokens.

The first blocks have separate weights for image and text. T5 makes the tokens of the text, CLIP a
pooled embedding.
"""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.base import base_metadata
from models.comfy import ComfyLayout, PooledLayout
from models.comfy_nodes import ComfyGuidance, ComfyNodes
from models.families.flux_names import FLUX_TABLE
from models.families.packing import PATCH, image_ids, pack, unpack
from models.families.transformer_family import (
    ATTENTION,
    CLIP_L_PREFIX,
    MLP,
    T5_PREFIX,
    TransformerFamily,
    pooled_rows,
)
from models.layer_names.tables import TableNames

TOKENS = 512
"""Tokens of T5, the pipelines' default."""
SCHNELL_TOKENS = 256
"""Tokens that schnell was trained with."""
INPUT_KEY = "img_in.weight"
BLOCK_KEYS = {
    "double_blocks.0.img_attn.qkv.weight",
    "single_blocks.0.linear1.weight",
    INPUT_KEY,
    "txt_in.weight",
}
"""Tensors of FLUX.1 and Chroma."""
GUIDANCE_KEY = "guidance_in.in_layer.weight"

TOKEN_CHANNELS = 64
"""Channels of a token of noisy latents alone."""
INPUT_HINTS = {
    TOKEN_CHANNELS: "It has no input for a mask. Use --model.family flux1 or flux1_kontext",
    384: "It paints a part of an image. Use --model.family flux1_fill",
}
OTHER_INPUT = "It follows an image in a way that cannot be trained here. Use another model"


class FluxFamily(TransformerFamily):
    """FLUX.1 and Chroma: cells of 2 x 2 latents are tokens, at positions (0, row, column).

    All text is at position (0, 0, 0)."""

    layer_names = TableNames(table=FLUX_TABLE)
    variable_length: ClassVar = {"prompt_embeds": None}
    unused_components: ClassVar[tuple[str, ...]] = ("feature_extractor", "image_encoder")
    latent_shift = 0.1159
    latent_scale = 0.3611
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|{MLP}|single_transformer_blocks\.\d+\.proj_(mlp|out)",
        "all": r".*",
    }

    @property
    def token_channels(self) -> int:
        """Channels of a token of the denoiser's input."""
        return self.latent_channels * PATCH**2

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        channels = config["in_channels"]
        if channels != self.token_channels:
            raise ModelError(
                f"--model.path {self.config.path}: takes {channels} channels per token; expected the "
                f"{self.token_channels} of {self.name}. {INPUT_HINTS.get(channels, OTHER_INPUT)}"
            )

    def mask(self, num_image_tokens: int, cond: dict[str, Any]) -> Tensor | None:
        """Return (B, tokens of text and images), false for the padding of a text.

        None if no text is padded: attention without a mask is faster."""
        has_padding = len(set(cond["lengths"])) > 1
        if not has_padding:
            return None
        text_mask = cond["attention_mask"].bool()
        shape = (len(text_mask), num_image_tokens)
        image_mask = torch.ones(shape, dtype=torch.bool, device=text_mask.device)
        return torch.cat([text_mask, image_mask], 1)

    def image_tokens(self, noisy: Tensor, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, tokens, channels) of all images, and their positions (tokens, 3)."""
        return tokens_of_images(self.with_controls(noisy, cond))

    @abstractmethod
    def denoiser_arguments(self, tokens: Tensor, cond: dict[str, Any]) -> dict[str, Any]:
        """Return the denoiser's arguments besides `tokens` (B, tokens of images, channels), their
        positions and the timestep."""

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        height, width = noisy.shape[2:]
        text = cond["prompt_embeds"]
        tokens, positions = self.image_tokens(noisy, cond)
        predicted = denoiser(
            hidden_states=tokens,
            timestep=timestep / 1000,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device),
            img_ids=positions,
            return_dict=False,
            **self.denoiser_arguments(tokens, cond),
        )[0]
        num_tokens = self.limits.num_tokens(noisy.shape)
        return unpack(predicted[:, :num_tokens], height, width)


def tokens_of_images(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the tokens (B, tokens, channels) of several latents, and their positions (tokens, 3).

    The noisy latents come first; the images that follow are control images."""
    tokens: list[Tensor] = []
    positions = []
    for image in images:
        is_control = bool(tokens)
        rows, columns = image.shape[2] // PATCH, image.shape[3] // PATCH
        tokens.append(pack(image))
        positions.append(image_ids(rows, columns, image.device, image=int(is_control)))
    return torch.cat(tokens, 1), torch.cat(positions)


def is_flux1_file(shapes: Mapping[str, tuple[int, ...]], paints_masks: bool) -> bool:
    """Return whether a single file has a FLUX.1 model of this kind.

    Fill has inputs for noisy latents, the masked image and the mask; models that follow a control image
    have two inputs."""
    if not BLOCK_KEYS | {"vector_in.in_layer.weight"} <= shapes.keys():
        return False
    has_mask_input = shapes[INPUT_KEY][1] > 2 * TOKEN_CHANNELS
    return has_mask_input == paints_masks


class Flux1(FluxFamily):
    """FLUX.1: T5 sees 512 tokens, 256 for schnell, with padding that counts like text.

    ComfyUI's conditioning has 256 tokens, or as many as a longer caption."""

    name = "flux1"
    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline", "FluxImg2ImgPipeline")
    denoiser_class = "FluxTransformer2DModel"
    text_components = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    caption_tokenizer = "tokenizer_2"
    file_prefixes: ClassVar = {
        **FluxFamily.file_prefixes,
        "text_encoder": CLIP_L_PREFIX,
        "text_encoder_2": T5_PREFIX,
    }
    has_guidance_input = True
    undistilled_model = "FLUX.1 dev (black-forest-labs/FLUX.1-dev)"
    comfy_widths: ClassVar = {4096: "FLUX.1"}

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return is_flux1_file(shapes, paints_masks=False)

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        super().check_denoiser(config)
        if config.get("guidance_embeds"):
            return
        scale = self.config.guidance_scale
        if scale is not None:
            raise ModelError(
                f"--model.guidance_scale {scale:g}: {self.config.path} has no guidance input, "
                "which only guidance-distilled models such as FLUX.1 dev have. Remove the option"
            )
        if self.files.is_single_file and GUIDANCE_KEY in self.files.denoiser_shapes:
            raise ModelError(
                f"--model.path {self.config.path}: has a guidance input, like FLUX.1 dev, but "
                f"--model.config {self.files.source} describes a model without one, like schnell. "
                "Use the configuration of the same model"
            )

    @property
    def is_distilled(self) -> bool:
        """True for schnell."""
        return not self.denoiser_config["guidance_embeds"] or super().is_distilled

    @property
    def max_tokens(self) -> int:
        return TOKENS if self.denoiser_config["guidance_embeds"] else SCHNELL_TOKENS

    @property
    def text_cache_tag(self) -> str:
        tag = super().text_cache_tag
        return tag if self.max_tokens == TOKENS else f"{self.max_tokens} tokens {tag}".rstrip()

    @property
    def pooled_width(self) -> int:
        return self.denoiser_config["pooled_projection_dim"]

    @cached_property
    def comfy(self) -> ComfyLayout:
        return PooledLayout(self.cond_width, self.pooled_width, self.sample_conditioning)

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        embeds, pooled, _ = encoders.encode_prompt(
            captions,
            device=encoders._execution_device,
            max_sequence_length=self.max_tokens,
        )
        return pooled_rows(embeds, pooled)

    def denoiser_arguments(self, tokens: Tensor, cond: dict[str, Any]) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        arguments["pooled_projections"] = cond["pooled_prompt_embeds"]
        mask = self.mask(tokens.shape[1], cond)
        if mask is not None:
            attention_options = {"attention_mask": mask[:, None, None]}
            arguments["joint_attention_kwargs"] = attention_options
        if self.denoiser_config["guidance_embeds"]:
            shape = (len(tokens),)
            arguments["guidance"] = torch.full(shape, self.guidance, device=tokens.device)
        return arguments

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        options = super().preview_options(guidance_scale)
        return {**options, "max_sequence_length": self.max_tokens}

    @property
    def comfy_nodes(self) -> ComfyNodes:  # type: ignore[override]
        return ComfyNodes(
            text_encoders=("clip_l.safetensors", "t5xxl_fp16.safetensors"),
            text_encoder_type="flux",
            vae="ae.safetensors",
            shift="ModelSamplingFlux",
            text_length=self.max_tokens,
        )

    def comfy_guidance(self, scale: float) -> ComfyGuidance:
        has_input = self.denoiser_config["guidance_embeds"]
        return ComfyGuidance(1.0, scale if has_input else None)

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        config: Any = denoiser.config
        variant = "dev" if config.guidance_embeds else "schnell"
        return base_metadata("flux1", f"flux-1-{variant}")


FAMILY = Flux1
