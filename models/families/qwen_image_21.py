"""Qwen-Image 2.1 (Qwen team 2026): a transformer over one stream of text and image, text first.

A token of the text sees the tokens before it, a token of the image sees all. The text encoder is
Qwen3-VL 8B. The VAE has a channel for transparency; training images are opaque.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from models.base import base_metadata
from models.comfy import ComfyLayout, MaskedLayout
from models.comfy_nodes import ComfyNodes
from models.component_loaders import ComponentLoaders
from models.encoder_placement import keep_first_layers
from models.families.packing import pack, unpack
from models.families.qwen_image import rows_without_padding
from models.families.qwen_vae import QwenVaeFamily
from models.layer_names.tables import Rule, Slice, TableNames
from models.text_encoder_files import check_tokenizer

USUAL_TOKENS = 1024
"""Tokens of a long caption, for estimates: the pipeline cuts no caption."""
PATCH = 1
"""Side of an image token in latents."""
SIDE_STEP = 2
"""Sides of the image in latents are multiples of this in the pipeline."""
ATTENTION = r"transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0)"
TABLE = (
    Rule(
        r"transformer_blocks\.(\d+)\.img_mlp\.",
        r"transformer_blocks.\1.img_mlp.",
        {"gate_layer": Slice("gate_up", 0), "proj": Slice("gate_up", 1)},
    ),
)


class QwenImage21(QwenVaeFamily):
    """Conditioning is the state after the encoder's last layer, before its norm.

    It is that of the caption in a chat template, without the system's message in front."""

    name_check = "compared with ComfyUI's source of September 2026, which was not run"
    name = "qwen_image_21"
    pipelines = ("QwenImage21Pipeline",)
    denoiser_class = "QwenImage21Transformer2DModel"
    vae_class = "AutoencoderKLQwenImage21"
    text_components = ("text_encoder", "processor")
    latent_channels = 64
    patch_size = PATCH
    layer_names = TableNames(table=TABLE)
    variable_length: ClassVar = {"prompt_embeds": None}
    max_tokens = USUAL_TOKENS
    cuts_captions = False
    cond_width_key = "context_in_dim"
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|transformer_blocks\.\d+\.img_mlp\.(proj|gate_layer|out)",
        "all": r".*",
    }
    comfy_widths: ClassVar = {4096: "Qwen-Image 2.1"}
    comfy_nodes = ComfyNodes(
        text_encoders=("qwen3vl_8b_bf16.safetensors",),
        text_encoder_type="qwen_image",
        vae="qwen_image_2.1_vae_bf16.safetensors",
        latents="EmptyLatentImage",
        shift="ModelSamplingAuraFlow",
    )

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return {"txt_in.text_norm.weight", "modulation.1.weight"} <= shapes.keys()

    def find_source(self) -> str:
        return "Qwen/Qwen-Image-2.1"

    @property
    def pixel_step(self) -> int:
        return self.latent_step * SIDE_STEP

    @cached_property
    def comfy(self) -> ComfyLayout:
        return MaskedLayout(self.cond_width)

    # Text.

    @cached_property
    def tokenizer(self) -> Any:
        from models.image_text_processor import load_tokenizer

        return load_tokenizer(self.files)

    def component_loaders(self) -> ComponentLoaders:
        return {**super().component_loaders(), "processor": self._load_processor}

    def _load_processor(self) -> Any:
        from models.image_text_processor import ImageTextProcessor3, load_processor

        return load_processor(self.files, self.tokenizer, ImageTextProcessor3)

    def stand_ins(self) -> dict[str, Any]:
        from models.image_text_processor import AbsentProcessor

        return {"processor": AbsentProcessor()}

    def trim_text_encoders(self, pipeline: Any) -> None:
        num_layers = pipeline.text_encoder.config.text_config.num_hidden_layers
        keep_first_layers(pipeline.text_encoder, num_layers)

    def load_encoders(self, role: Literal["text", "media"]) -> Any:
        encoders = super().load_encoders(role)
        if role == "text":
            check_tokenizer(self.config.path, self.tokenizer, encoders.text_encoder)
        return encoders

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        embeds, mask, _ = encoders.encode_prompt(captions, device=encoders._execution_device)
        return rows_without_padding(embeds, mask)

    # Images.

    def encode_media(self, encoders: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        opaque = torch.ones_like(pixels[:, :1])
        return super().encode_media(encoders, torch.cat([pixels, opaque], 1))

    def decode_media(self, encoders: Any, latents: Tensor) -> Tensor:
        pixels = super().decode_media(encoders, latents)
        return pixels[:, :3]

    # Denoising.

    def adapt_denoiser(self, denoiser: nn.Module) -> None:
        from models.families.qwen_image_21_samples import compute_by_sample

        compute_by_sample(denoiser)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        has_padding = len(set(cond["lengths"])) > 1
        tokens = denoiser(
            hidden_states=pack(noisy, PATCH),
            encoder_hidden_states=cond["prompt_embeds"],
            timestep=timestep / 1000,
            image_size=(height, width),
            encoder_hidden_states_mask=cond["attention_mask"] if has_padding else None,
        )
        return unpack(tokens, height, width, PATCH)

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        options: dict[str, Any] = {
            "true_cfg_scale": guidance_scale,
            "use_kv_cache": False,  # it spares the text alone, a few tokens
        }
        if guidance_scale > self.neutral_guidance:
            options["negative_prompt"] = " "  # without one the pipeline ignores the scale
        return options

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        source = "https://github.com/QwenLM/Qwen-Image"
        return base_metadata("qwen_image_21", "Qwen-Image-2.1", source)


FAMILY = QwenImage21
