"""FLUX.2: a transformer over the tokens of a caption and of 16 x 16 pixels each (Black Forest Labs
2025, https://bfl.ai/blog/flux-2), with three layers of Mistral Small 3 as conditioning; klein's
part is in flux2_klein.py.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.base import base_metadata, check_comfy_cond
from models.families.packing import image_ids
from models.families.transformer_family import TransformerFamily, counts
from models.layer_names.transformers import FLUX, FLUX2_NATIVE_ONLY
from objectives.config import ObjectiveConfig
from objectives.processes import Flow, NoiseProcess

TOKENS = 512  # of every caption, with padding, which the denoiser sees
STEPS = 50  # the pipelines' default
ATTENTION = r".*\.attn\.(to_(q|k|v|out|out\.0|add_out|qkv_mlp_proj)|add_(q|k|v)_proj)"


def empirical_shift(tokens: int) -> float:
    """What the pipeline shifts by at its default number of steps; e^2.02, ComfyUI's constant, at
    1024 x 1024 pixels.

    As there, it is smaller from 4301 tokens on: e^1.18.
    """
    from diffusers.pipelines.flux2.pipeline_flux2 import (
        compute_empirical_mu,
    )  # slow import, for this family alone

    return math.exp(compute_empirical_mu(tokens, STEPS))


class Flux2Family(TransformerFamily):
    """What FLUX.2 dev and klein have in common.

    Raw latents are what ComfyUI's VAE gives, and what is denoised: cells of 2 x 2 as channels, normalized by the
    statistics that the VAE has. Of conditioning, the padding that stands before a caption, whose tokens are all alike,
    is stored once: `pad_embeds`. In ComfyUI's own conditioning, which has none, it is zero, as it is there.
    """

    latent_channels = 128
    denoiser_class = "Flux2Transformer2DModel"
    vae_class = "AutoencoderKLFlux2"
    in_file: ClassVar = {}
    names, native_only = FLUX, FLUX2_NATIVE_ONLY
    ragged: ClassVar = {"prompt_embeds": TOKENS}
    targets: ClassVar = {
        "attention": ATTENTION,  # the single blocks' has their MLP in it
        "attention-mlp": rf"{ATTENTION}|.*\.ff(_context)?\.linear_(in|out)",
        "all": r".*",
    }

    def denoiser_of_file(self, denoiser_class: Any, dtype: torch.dtype) -> nn.Module:
        return self.denoiser_by_names(
            denoiser_class, dtype
        )  # diffusers' converter knows no ComfyUI prefix

    def latent_step(self) -> int:
        return 2 * super().latent_step()

    def pixel_step(self) -> int:
        return self.latent_step()

    def tokens(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[2:])

    @property
    def cond_width(self) -> int:
        return self.denoiser_config["joint_attention_dim"]

    def encode_media(self, encoders: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        center, spread = statistics(encoders.vae)
        mean, deviation = map(encoders._patchify_latents, super().encode_media(encoders, pixels))
        return (mean - center) / spread, deviation / spread

    def decode_media(self, encoders: Any, latents: Tensor) -> Tensor:
        center, spread = statistics(encoders.vae)
        return super().decode_media(
            encoders, encoders._unpatchify_latents(latents * spread + center)
        )

    def normalize(self, latents: Tensor) -> Tensor:
        return latents

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        embeds, _ = encoders.encode_prompt(
            captions, encoders.text_encoder.device, max_sequence_length=TOKENS
        )
        return [without_padding(embed) for embed in embeds]

    @abstractmethod
    def frame(self) -> int:
        """The number of tokens that stand around every caption."""

    def token_counts(self, captions: list[str]) -> tuple[list[int], int]:
        tokenizer = getattr(
            self.counting_tokenizer, "tokenizer", self.counting_tokenizer
        )  # of a processor
        found, _ = counts(tokenizer, captions, TOKENS)
        return found, TOKENS - self.frame()

    def cond_bytes(self) -> int:
        return (TOKENS + 1) * self.cond_width * self._text_dtype("text_encoder").itemsize

    def cond_from_comfy(self, cond: Tensor, extras: dict[str, Any]) -> dict[str, Tensor]:
        check_comfy_cond(cond, self.cond_width)
        return without_padding(cond[0])

    def cond_to_comfy(self, cond: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        embeds, pad = cond["prompt_embeds"], cond["pad_embeds"]
        if pad.any():
            embeds = torch.cat([pad.expand(TOKENS - len(embeds), -1), embeds])
        return embeds[None], {"pooled_output": None}

    def process(self, config: ObjectiveConfig) -> NoiseProcess:
        process = super().process(config)
        if config.shift is None and self.scheduler_config.get("use_dynamic_shifting"):
            return Flow(empirical_shift, self.scheduler_config.get("num_train_timesteps", 1000))
        return process

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Tensor]
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        text_ids = nn.functional.pad(torch.arange(TOKENS, device=noisy.device)[:, None], (3, 0))
        guidance = torch.full_like(timestep, self.guidance) if self.takes_guidance else None
        tokens = denoiser(
            noisy.flatten(2).transpose(1, 2),
            timestep=timestep / 1000,
            guidance=guidance,
            return_dict=False,
            encoder_hidden_states=padded(
                cond["prompt_embeds"], cond["attention_mask"], cond["pad_embeds"]
            ),
            txt_ids=text_ids,
            img_ids=image_ids(height, width, noisy.device, 4),
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def model_metadata(self, variant: str) -> dict[str, str]:
        """`file_metadata` of a variant, as musubi-tuner writes it."""
        version = f"flux_2_{variant.replace('-', '_')}"
        return base_metadata(
            version, f"Flux.2-{variant}", "https://github.com/black-forest-labs/flux2"
        )


class Flux2(Flux2Family):
    """FLUX.2 dev, which is distilled from one with classifier-free guidance: it is told how much."""

    name = "flux2"
    pipelines = ("Flux2Pipeline",)
    takes_guidance = True

    @classmethod
    def holds(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return {
            "double_stream_modulation_img.lin.weight",
            "guidance_in.in_layer.weight",
        } <= shapes.keys()

    def own_parts(self, wanted: tuple[str, ...]) -> dict[str, Any]:
        from transformers import AutoTokenizer
        from transformers.utils import is_torchvision_available

        if "tokenizer" not in wanted or is_torchvision_available():
            return {}
        # the pipeline's processor, which is for images too, needs torchvision, but captions only
        # its tokenizer
        options = {
            "subfolder": "tokenizer",
            "local_files_only": self._from_pretrained["local_files_only"],
        }
        with self._faults_told():
            return {"tokenizer": AutoTokenizer.from_pretrained(self.source, **options)}

    def frame(self) -> int:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input
        from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

        template = self.counting_tokenizer.apply_chat_template
        return len(
            template(format_input([""], SYSTEM_MESSAGE), tokenize=True, return_dict=True)[
                "input_ids"
            ][0]
        )

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return self.model_metadata("dev")


def statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the VAE's latents, patched, per channel, (1, C, 1, 1)."""
    variance = vae.bn.running_var + vae.config.batch_norm_eps
    return vae.bn.running_mean.view(1, -1, 1, 1), variance.sqrt().view(1, -1, 1, 1)


def without_padding(embeds: Tensor) -> dict[str, Tensor]:
    """Tokens (L, D) without those at their beginning that are all the same, which are given once
    (D,): zero if none."""
    same = int((embeds == embeds[0]).all(1).int().cumprod(0).sum())
    if same < 2 or len(embeds) < TOKENS:
        return {"prompt_embeds": embeds, "pad_embeds": torch.zeros_like(embeds[0])}
    return {"prompt_embeds": embeds[same:].clone(), "pad_embeds": embeds[0].clone()}


def padded(embeds: Tensor, mask: Tensor, pad: Tensor) -> Tensor:
    """Tokens (B, L, D), of which those in `mask` (B, L) are at the beginning, moved to the end,
    behind `pad` (B, D)."""
    places, count = torch.arange(mask.shape[1], device=mask.device), mask.sum(1, keepdim=True)
    moved = embeds.gather(1, ((places + count) % len(places))[..., None].expand_as(embeds))
    return torch.where((places < len(places) - count)[..., None], pad[:, None], moved)


FAMILY = Flux2
