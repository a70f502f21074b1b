"""Ideogram 4 (Ideogram 2026): a transformer over one stream of text and image.

Thirteen layers of Qwen3-VL 8B are the conditioning, and the VAE is that of FLUX.2. A second transformer,
which sees no text, predicts what guidance leads away from. It is not trained.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from common.errors import ModelError
from common.precision import autocast_dtype
from models.base import base_metadata
from models.comfy import ComfyLayout, MaskedLayout
from models.encoder_placement import keep_first_layers, let_name_device
from models.families.flux2_vae import CELL, Flux2VaeFamily
from models.families.packing import image_ids
from models.layer_names.tables import Rule, TableNames, fused_qkv
from objectives.config import ObjectiveConfig
from objectives.processes import Flow, NoiseProcess

TOKENS = 2048
"""Tokens of a caption with the template around it, the pipeline's default."""
SUFFIX_TOKENS = 5
"""Tokens of the template after a caption."""
UNSHIFTED_TOKENS = 1024
"""Image tokens, of 512 x 512 pixels, for which the noise levels are not shifted."""
ATTENTION = r"layers\.\d+\.attention\.to_(q|k|v|out\.0)"
TABLE = (
    Rule(
        r"layers\.(\d+)\.attention\.",
        r"layers.\1.attention.",
        {**fused_qkv("", "qkv"), "to_out.0": "o"},
    ),
)


def resolution_shift(tokens: int) -> float:
    """Return e^mu of the pipeline, where mu is half the logarithm of the relative area."""
    return math.sqrt(tokens / UNSHIFTED_TOKENS)


class Ideogram4(Flux2VaeFamily):
    """Conditioning is (L, D): the states of the caption in a chat template."""

    name_check = "those of diffusers' converter and of ComfyUI's source; ComfyUI was not run"
    name = "ideogram4"
    pipelines = ("Ideogram4Pipeline",)
    denoiser_class = "Ideogram4Transformer2DModel"
    other_denoisers = ("unconditional_transformer",)
    unused_components: ClassVar[tuple[str, ...]] = ("prompt_enhancer_head",)
    # the names that diffusers' converter of LoRAs reads; ComfyUI knows no others
    layer_names = TableNames(
        table=TABLE,
        original_only=r".*",
        file_formats=("comfyui",),
        diffusers_prefix="",
    )
    variable_length: ClassVar = {"prompt_embeds": None}
    max_tokens = TOKENS
    cond_width_key = "llm_features_dim"
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|layers\.\d+\.feed_forward\.w[123]",
        "all": r".*",
    }
    comfy_widths: ClassVar = {53248: "Ideogram 4"}

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return {"embed_image_indicator.weight", "layers.0.attention.qkv.weight"} <= shapes.keys()

    def find_source(self) -> str:
        raise ModelError(
            f"--model.path {self.config.path}: Ideogram published no folder that this file could get its "
            "text encoder and VAE from; expected --model.config with a diffusers folder of Ideogram 4"
        )

    def check(self) -> None:
        super().check()
        vae = self.config.vae
        if vae is not None and Path(vae).is_file():
            raise ModelError(
                f"--model.vae {vae}: is a file, whose statistics of latents are in the order of "
                "FLUX.2; expected a diffusers folder of Ideogram 4's VAE. Remove the option, or "
                "name such a folder"
            )

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        is_quantized = "quantization_config" in config
        if is_quantized and not self.files.is_single_file:
            raise ModelError(
                f"--model.path {self.config.path}: has quantized weights, as Ideogram released them, "
                "which are not read in a folder. Use a folder in bf16, a GGUF file, or a file with "
                "scaled weights"
            )

    def vae_statistics(self, vae: Any) -> tuple[Tensor, Tensor]:
        """Return the statistics, which the pipeline has channel by channel for each latent of a cell."""
        mean, deviation = super().vae_statistics(vae)
        return channels_first(mean), channels_first(deviation)

    @cached_property
    def comfy(self) -> ComfyLayout:
        return MaskedLayout(self.cond_width, max_tokens=TOKENS)

    def process(self, config: ObjectiveConfig) -> NoiseProcess:
        process = super().process(config)
        if config.shift is None and isinstance(process, Flow):
            return Flow(resolution_shift, process.num_train_timesteps)
        return process

    def load_encoders(self, role: Literal["text", "media"]) -> Any:
        encoders = super().load_encoders(role)
        if role == "text":
            let_name_device(encoders.text_encoder)
        return encoders

    def trim_text_encoders(self, pipeline: Any) -> None:
        from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS

        keep_first_layers(pipeline.text_encoder, QWEN3_VL_ACTIVATION_LAYERS[-1])

    def num_template_tokens(self) -> int:
        return len(template_tokens(self.tokenizer, ""))

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        """Encode one caption after the other: the pipeline pads each of them to 2048 tokens."""
        device = encoders._execution_device
        rows = []
        for caption in captions:
            tokens = template_tokens(encoders.tokenizer, caption)
            if len(tokens) > TOKENS:
                tokens = tokens[: TOKENS - SUFFIX_TOKENS] + tokens[-SUFFIX_TOKENS:]
            ids = torch.tensor([tokens], device=device)
            positions = torch.arange(len(tokens), device=device)[None]
            states = encoders._get_text_encoder_hidden_states(
                encoders.text_encoder, ids, torch.ones_like(ids), positions
            )
            embeds = torch.stack(states, -1).flatten(2)
            rows.append({"prompt_embeds": embeds[0]})
        return rows

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        num_image_tokens = height * width
        embeds = cond["prompt_embeds"]
        num_text_tokens = embeds.shape[1]
        cells = channels_last(noisy)
        tokens = cells.flatten(2).transpose(1, 2)
        time = 1 - timestep / 1000
        if autocast_dtype(noisy.device.type) is None:
            time = time.to(noisy.dtype)  # layers without autocast take the dtype of their weights
        predicted = denoiser(
            hidden_states=nn.functional.pad(tokens, (0, 0, num_text_tokens, 0)),
            timestep=time,
            encoder_hidden_states=nn.functional.pad(embeds, (0, 0, 0, num_image_tokens)),
            position_ids=positions_of(num_text_tokens, noisy),
            **kinds_of(cond["attention_mask"], num_image_tokens),
            return_dict=False,
        )[0]
        # the velocity is from the noise to the image
        velocity = predicted[:, num_text_tokens:].transpose(1, 2)
        velocity_cells = velocity.unflatten(2, (height, width))
        return -channels_first(velocity_cells)

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        return {"guidance_scale": guidance_scale, "guidance_schedule": None}

    def prompt_options(self, prompt: str) -> dict[str, Any]:
        """Return a limit without padding, which has no effect on the other tokens.

        The pipeline refuses longer prompts, so one that training would cut is seen as a whole."""
        num_tokens = len(template_tokens(self.tokenizer, prompt))
        return {"max_sequence_length": num_tokens}

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return base_metadata("ideogram4", "Ideogram-4", "https://github.com/ideogram-oss/ideogram4")


def template_tokens(tokenizer: Any, caption: str) -> list[int]:
    """Return the tokens of a caption with the template around it."""
    content = [{"type": "text", "text": caption}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(text, add_special_tokens=False).input_ids


def channels_last(cells: Tensor) -> Tensor:
    """Return cells (B, C, ...) with all channels of the first latent first, as in tokens."""
    by_channel = cells.unflatten(1, (-1, CELL**2))
    by_latent = by_channel.transpose(1, 2)
    return by_latent.flatten(1, 2)


def channels_first(cells: Tensor) -> Tensor:
    """Return cells (B, C, ...) in the order of latents.

    This is the inverse of `channels_last`."""
    by_latent = cells.unflatten(1, (CELL**2, -1))
    by_channel = by_latent.transpose(1, 2)
    return by_channel.flatten(1, 2)


def positions_of(num_text_tokens: int, noisy: Tensor) -> Tensor:
    """Return the positions (B, L, 3) of text tokens and, far from these, of latents (B, C, h, w)."""
    from diffusers.models.transformers.transformer_ideogram4 import IMAGE_POSITION_OFFSET

    height, width = noisy.shape[-2:]
    text_positions = torch.arange(num_text_tokens, device=noisy.device, dtype=torch.float32)
    image_positions = image_ids(height, width, noisy.device) + IMAGE_POSITION_OFFSET
    positions = torch.cat([text_positions[:, None].expand(-1, 3), image_positions])
    return positions.expand(len(noisy), -1, -1)


def kinds_of(mask: Tensor, num_image_tokens: int) -> dict[str, Tensor]:
    """Return the segments and kinds (B, L) of tokens: those of captions (B, L), then those of images.

    Padding is in another segment, which hides it from the other tokens."""
    from diffusers.models.transformers.transformer_ideogram4 import (
        LLM_TOKEN_INDICATOR,
        OUTPUT_IMAGE_INDICATOR,
        SEQUENCE_PADDING_INDICATOR,
    )

    is_caption = mask.bool()
    segments = torch.where(is_caption, 1, SEQUENCE_PADDING_INDICATOR)
    kinds = torch.where(is_caption, LLM_TOKEN_INDICATOR, 0)
    image = (0, num_image_tokens)
    return {
        "segment_ids": nn.functional.pad(segments, image, value=1),
        "indicator": nn.functional.pad(kinds, image, value=OUTPUT_IMAGE_INDICATOR),
    }


FAMILY = Ideogram4
