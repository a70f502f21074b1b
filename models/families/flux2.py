"""FLUX.2 dev (Black Forest Labs 2025, https://bfl.ai/blog/flux-2): a transformer over tokens.

A token of the image is 16 x 16 pixels. Three layers of Mistral Small 3 are the conditioning. The
klein models are in flux2_klein.py.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.base import TensorLayout, TokenCounts, base_metadata
from models.comfy import ComfyConditioning, ComfyLayout, Conditioning
from models.comfy_nodes import ComfyGuidance, ComfyNodes
from models.controls import ControlLimits, ControlSize
from models.diffusers_family import ComponentLoaders
from models.encoder_placement import keep_first_layers
from models.families.flux2_controls import cropped_size, side_error
from models.families.flux2_vae import Flux2VaeFamily
from models.families.flux_names import FLUX_TABLE
from models.families.packing import image_ids
from models.layer_names.tables import TableNames
from objectives.config import ObjectiveConfig
from objectives.processes import Flow, NoiseProcess

TOKENS = 512
"""Tokens of every caption, with the padding, which the denoiser sees."""
NUM_STEPS = 50
"""The pipelines' default number of steps."""
CONTROL_DISTANCE = 10
"""Distance on axis 0 between an image and the next one."""
ATTENTION = r".*\.attn\.(to_(q|k|v|out|out\.0|add_out|qkv_mlp_proj)|add_(q|k|v)_proj)"
"""In single blocks, the projections contain the MLP."""
MODULATION_KEY = "double_stream_modulation_img.lin.weight"
GUIDANCE_KEY = "guidance_in.in_layer.weight"


def empirical_shift(tokens: int) -> float:
    """Return the pipeline's shift at its default number of steps.

    It is e^2.02, ComfyUI's constant, at 1024 x 1024 pixels. From 4301 tokens on it is e^1.18."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu  # slow import

    return math.exp(compute_empirical_mu(tokens, NUM_STEPS))


def image_positions(images: list[Tensor]) -> Tensor:
    """Return the positions (tokens, 4) of noisy latents and of the control images that follow."""
    positions = []
    for number, image in enumerate(images):
        height, width = image.shape[-2:]
        offset = number * CONTROL_DISTANCE
        ids = image_ids(height, width, image.device, axes=4, image=offset)
        positions.append(ids)
    return torch.cat(positions)


class PaddedLayout(ComfyLayout):
    """ComfyUI's tokens have no padding, or padding in front. In its own, `pad_embeds` is zero."""

    def tensors(self, cond: Tensor, extras: dict[str, Any]) -> Conditioning:
        return without_padding(cond[0])

    def conditioning(self, tensors: Conditioning) -> ComfyConditioning:
        embeds = tensors["prompt_embeds"]
        pad = tensors["pad_embeds"]
        if pad.any():
            padding = pad.expand(TOKENS - len(embeds), -1)
            embeds = torch.cat([padding, embeds])
        return embeds[None], {"pooled_output": None}


class Flux2Family(Flux2VaeFamily):
    """FLUX.2 dev and klein.

    Padding is in front of a caption, and its embeddings are all equal. They are stored once, as
    `pad_embeds`."""

    denoiser_class = "Flux2Transformer2DModel"
    layer_names = TableNames(
        table=FLUX_TABLE,
        original_only=r"time_guidance_embed\..*|(double|single)_stream_modulation.*",
    )
    variable_length: ClassVar = {"prompt_embeds": TOKENS}
    max_tokens = TOKENS
    controls = ControlLimits(max_count=10)
    text_layers: ClassVar[tuple[int, ...]]
    """Hidden states of the text encoder that are the conditioning, one after the other."""
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|.*\.ff(_context)?\.linear_(in|out)",
        "all": r".*",
    }

    @cached_property
    def comfy(self) -> ComfyLayout:
        return PaddedLayout(self.cond_width, max_tokens=TOKENS)

    def trim_text_encoders(self, pipeline: Any) -> None:
        keep_first_layers(pipeline.text_encoder, self.text_layers[-1])

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        device = encoders._execution_device
        embeds, _ = encoders.encode_prompt(
            captions,
            device,
            max_sequence_length=TOKENS,
            text_encoder_out_layers=self.text_layers,
        )
        return [without_padding(prompt_embeds) for prompt_embeds in embeds]

    @abstractmethod
    def num_template_tokens(self) -> int:
        """Return the number of tokens around every caption."""

    def count_tokens(self, captions: list[str]) -> TokenCounts:
        tokenizer = getattr(self.tokenizer, "tokenizer", self.tokenizer)  # of a processor
        limit = TOKENS - self.num_template_tokens()
        return TokenCounts.of_captions(tokenizer, captions, limit)

    def cond_layout(self) -> dict[str, TensorLayout]:
        layout = super().cond_layout()
        dtype = layout["prompt_embeds"].dtype
        return {**layout, "pad_embeds": TensorLayout((self.cond_width,), dtype)}

    def process(self, config: ObjectiveConfig) -> NoiseProcess:
        process = super().process(config)
        if config.shift is None and self.scheduler_config.get("use_dynamic_shifting"):
            num_timesteps = self.scheduler_config.get("num_train_timesteps", 1000)
            return Flow(empirical_shift, num_timesteps)
        return process

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        images = self.with_controls(noisy, cond)
        rows = [image.flatten(2) for image in images]
        tokens = torch.cat(rows, 2)
        text_positions = torch.arange(TOKENS, device=noisy.device)[:, None]
        guidance = None
        if self.has_guidance_input:
            guidance = torch.full_like(timestep, self.guidance)
        predicted = denoiser(
            tokens.transpose(1, 2),
            timestep=timestep / 1000,
            guidance=guidance,
            return_dict=False,
            encoder_hidden_states=with_padding(
                cond["prompt_embeds"], cond["attention_mask"], cond["pad_embeds"]
            ),
            txt_ids=nn.functional.pad(text_positions, (3, 0)),
            img_ids=image_positions(images),
        )[0]
        num_tokens = height * width
        noisy_tokens = predicted[:, :num_tokens]
        return noisy_tokens.transpose(1, 2).unflatten(2, (height, width))

    def control_error(self, width: int, height: int) -> str | None:
        return side_error(width, height, "FLUX.2")

    def control_size(self, width: int, height: int, max_pixels: int | None) -> ControlSize:
        return cropped_size(width, height, max_pixels, self.pixel_step)

    def variant_metadata(self, variant: str) -> dict[str, str]:
        """Return `file_metadata` of a variant, as musubi-tuner writes it."""
        version = f"flux_2_{variant.replace('-', '_')}"
        return base_metadata(
            version, f"Flux.2-{variant}", "https://github.com/black-forest-labs/flux2"
        )


class Flux2(Flux2Family):
    """FLUX.2 dev, which is guidance-distilled."""

    name = "flux2"
    pipelines = ("Flux2Pipeline",)
    has_guidance_input = True
    text_layers = (10, 20, 30)
    comfy_widths: ClassVar = {15360: "FLUX.2 dev"}
    comfy_nodes = ComfyNodes(
        text_encoders=("mistral_3_small_flux2_bf16.safetensors",),
        text_encoder_type="flux2",
        vae="flux2-vae.safetensors",
        latents="EmptyFlux2LatentImage",
        has_size_scheduler=True,
    )

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return {MODULATION_KEY, GUIDANCE_KEY} <= shapes.keys()

    def comfy_guidance(self, scale: float) -> ComfyGuidance:
        return ComfyGuidance(1.0, scale)

    def replacement_loaders(self) -> ComponentLoaders:
        from transformers.utils import is_torchvision_available

        if is_torchvision_available():
            return {}
        return {"tokenizer": self._load_tokenizer}

    def _load_tokenizer(self) -> Any:
        """Load the tokenizer alone.

        The pipeline's processor, which is also for images, needs torchvision. Captions need only
        its tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            self.files.source,
            subfolder="tokenizer",
            local_files_only=self.files.load_options["local_files_only"],
        )

    def num_template_tokens(self) -> int:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input
        from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

        messages = format_input([""], SYSTEM_MESSAGE)
        tokens = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        return len(tokens["input_ids"][0])

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return self.variant_metadata("dev")


def without_padding(embeds: Tensor) -> dict[str, Tensor]:
    """Return tokens (L, D) without the equal ones in front, and one of these as `pad_embeds` (D,).

    `pad_embeds` is zero if there is no padding."""
    equals_first = (embeds == embeds[0]).all(1)
    num_padding = int(equals_first.int().cumprod(0).sum())
    has_padding = num_padding >= 2 and len(embeds) >= TOKENS
    if not has_padding:
        return {"prompt_embeds": embeds, "pad_embeds": torch.zeros_like(embeds[0])}
    return {
        "prompt_embeds": embeds[num_padding:].clone(),
        "pad_embeds": embeds[0].clone(),
    }


def with_padding(embeds: Tensor, mask: Tensor, pad: Tensor) -> Tensor:
    """Return tokens (B, L, D) with those in `mask` (B, L) moved from the front to the end.

    `pad` (B, D) is in front of them."""
    num_positions = mask.shape[1]
    positions = torch.arange(num_positions, device=mask.device)
    counts = mask.sum(1, keepdim=True)
    sources = (positions + counts) % num_positions
    moved = embeds.gather(1, sources[..., None].expand_as(embeds))
    is_padding = positions < num_positions - counts
    return torch.where(is_padding[..., None], pad[:, None], moved)


FAMILY = Flux2
