"""Wan 2.1 and 2.2 (Wan Team 2025, arXiv 2503.20314), text to video: a transformer over latents of
videos, with umT5.

The A14B of Wan 2.2 is two denoisers, one for the noisier and one for the cleaner part of the way.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.base import base_metadata, check_comfy_cond, with_frames
from models.config import ModelConfig
from models.families.transformer_family import TransformerFamily, counts
from models.layer_names.transformers import WAN, WAN_NATIVE_ONLY
from objectives.config import ObjectiveConfig
from objectives.processes import Flow, NoiseProcess

TEXT_TOKENS = 512  # the pipeline's default, and all that the denoiser takes
ATTENTION = r"blocks\.\d+\.attn[12]\.(to_(q|k|v|out\.0)|add_[kv]_proj)"
EXPERTS = {"high": "transformer", "low": "transformer_2"}
CLIP_VIEW = "img_emb.proj.0.weight"
PATCHES = "patch_embedding.weight"
WAN_NAMES = {"head.modulation", "blocks.0.self_attn.q.weight", PATCHES}
IMAGE_CHANNELS = 36  # the input's, of noisy latents, a mask and the first frame's latents
OTHERS = ("vace_blocks.0.after_proj.bias", "motion_encoder.dec.direction.weight", CLIP_VIEW)


class Wan(TransformerFamily):
    """Images are videos of one frame. The tokens of a caption are followed by zeros, which count as
    tokens."""

    name = "wan"
    pair: ClassVar[str] = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"  # the model of two denoisers
    pipelines = ("WanPipeline",)
    media = "video"
    frame_step = 4
    denoiser_class = "WanTransformer3DModel"
    vae_class = "AutoencoderKLWan"
    in_file: ClassVar = {}
    unused: ClassVar[tuple[str, ...]] = ("transformer_2",)
    file_formats = ("comfyui",)  # which diffusers reads too, and ComfyUI no other
    by_diffusers = ""
    alphas = False  # which diffusers' converter takes in the blocks alone
    names = WAN
    native_only = WAN_NATIVE_ONLY
    ragged: ClassVar = {"prompt_embeds": TEXT_TOKENS}
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|blocks\.\d+\.ffn\.net\.(0\.proj|2)",
        "all": r".*",
    }

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.component = EXPERTS[config.expert or "high"]

    @classmethod
    def holds(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return (
            shapes.keys() >= WAN_NAMES
            and not shapes.keys() & {*OTHERS}
            and IMAGE_CHANNELS not in shapes[PATCHES][1:2]
        )

    def _config_of_file(self) -> str:
        width, channels = self.stored_shapes[f"{self.stored_prefix}{PATCHES}"][:2]
        if (width, channels) == (3072, 48):
            return "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
        if (
            channels == IMAGE_CHANNELS
            and f"{self.stored_prefix}{CLIP_VIEW}" not in self.stored_shapes
        ):
            return self.pair
        return super()._config_of_file()

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        if config["in_channels"] != config["out_channels"]:
            raise ModelError(
                f"--model.path {self.config.path} makes videos of images, which this family does not: its denoiser "
                f"takes {config['in_channels']} channels and gives {config['out_channels']}"
            )

    @cached_property
    def boundary(self) -> float | None:
        """The noise level (sigma) from which on the expert for high noise has its turn; None: there
        is one denoiser."""
        index = self.pipeline_config
        has_both = index.get(EXPERTS["low"], [None])[0] is not None
        return index.get("boundary_ratio") if has_both else None

    @property
    def has_experts(self) -> bool:
        return self.boundary is not None

    @property
    def without_experts(self) -> str:
        if self.path.is_dir():
            return super().without_experts
        return f"leave it out, or if this is one of Wan 2.2's two files, give --model.config {self.pair}"

    def _check_expert(self) -> None:
        """Raises ModelError for a single file that may be either expert and is not said to be one."""
        if self.path.is_dir() or self.config.expert is not None:
            return
        said = re.search("(high|low)[_-]?noise", self.path.name, re.IGNORECASE)
        looks = said and said[1].lower()
        if (
            looks and self.config.config is None and self.name == "wan"
        ):  # by its tensors it could be Wan 2.1's
            raise ModelError(
                f"--model.path {self.config.path} looks like Wan 2.2's expert for {looks} noise by its name: give "
                f"--model.config {self.pair} --model.expert {looks}. A file of Wan 2.1 wants another name"
            )
        if self.has_experts:
            hint = f"; by its name it looks like {looks}" if looks else ""
            raise ModelError(
                f"--model.path {self.config.path} is one of two denoisers: say which by --model.expert high or "
                f"--model.expert low{hint}"
            )

    @property
    def components(self) -> tuple[str, ...]:
        denoisers = EXPERTS.values() if self.has_experts else (self.component,)
        return (*self.text, "vae", *denoisers, "scheduler")

    @property
    def latent_channels(self) -> int:  # type: ignore[override]
        return self.vae_config.get("z_dim", 16)

    @property
    def fps(self) -> float:  # type: ignore[override]
        return 16.0 if self.latent_channels == 16 else 24.0

    def latent_step(self) -> int:
        return self.vae_config.get("scale_factor_spatial", 8)

    def pixel_step(self) -> int:
        return self.latent_step() * self.denoiser_config["patch_size"][-1]

    def encode_media(self, encoders: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return super().encode_media(encoders, with_frames(pixels, True))

    def decode_media(self, encoders: Any, latents: Tensor) -> Tensor:
        return with_frames(super().decode_media(encoders, latents), latents.shape[2] > 1)

    def process(self, config: ObjectiveConfig) -> NoiseProcess:
        self._check_expert()
        process = super().process(config)
        if self.boundary is not None and isinstance(process, Flow):
            border = process.t_of_sigma(self.boundary, tokens=0)
            process.t_range = (0.0, border) if self.config.expert == "low" else (border, 1.0)
        return process

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        device = encoders.text_encoder.device
        embeds, _ = encoders.encode_prompt(
            captions,
            do_classifier_free_guidance=False,
            max_sequence_length=TEXT_TOKENS,
            device=device,
        )
        cleaned = [prompt_clean(caption) for caption in captions]
        tokens = encoders.tokenizer(cleaned, truncation=True, max_length=TEXT_TOKENS).input_ids
        return [
            {"prompt_embeds": embed[: len(own)]} for embed, own in zip(embeds, tokens, strict=True)
        ]

    def token_counts(self, captions: list[str]) -> tuple[list[int], int]:
        return counts(self.counting_tokenizer, captions, TEXT_TOKENS)

    @property
    def _width(self) -> int:
        return self.denoiser_config["text_dim"]

    def cond_bytes(self) -> int:
        return TEXT_TOKENS * self._width * torch.float32.itemsize

    def cond_from_comfy(self, cond: Tensor, extras: dict[str, Any]) -> dict[str, Tensor]:
        check_comfy_cond(cond, self._width)
        used = cond[0].any(-1).nonzero()  # the rest is put there when a batch is made
        return {"prompt_embeds": cond[0, : int(used[-1]) + 1 if len(used) else 1]}

    def cond_to_comfy(self, cond: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        rest = TEXT_TOKENS - len(cond["prompt_embeds"])
        return nn.functional.pad(cond["prompt_embeds"], (0, 0, 0, rest))[None], {
            "pooled_output": None
        }

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Tensor]
    ) -> Tensor:
        # the 5B's pipeline gives each token its timestep; from text alone all have the same, as one
        # number says
        return denoiser(noisy, timestep, cond["prompt_embeds"], return_dict=False)[0]

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        return {"guidance_scale": guidance_scale, "num_frames": 1}

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        version = "wan2.2" if self.has_experts or self.latent_channels != 16 else "wan2.1"
        found = base_metadata(version, version)
        if self.boundary is not None:
            border = round(self.boundary * 1000)
            found["modelspec.timestep_range"] = (
                f"0,{border}" if self.config.expert == "low" else f"{border},1000"
            )
        return found


FAMILY = Wan
