"""Wan 2.1 and 2.2, text to video (Wan Team 2025, arXiv 2503.20314): a transformer over videos.

Its text encoder is umT5. Wan 2.2 A14B has two denoisers, the experts: one for the noisier and one
for the cleaner levels.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.base import TensorLayout, base_metadata
from models.comfy import ComfyConditioning, ComfyLayout, Conditioning
from models.comfy_nodes import ComfyNodes
from models.families.video_family import VideoFamily
from models.families.wan_names import WAN_NAMES
from objectives.config import ObjectiveConfig
from objectives.processes import Flow, NoiseProcess

TOKENS = 512
"""Tokens of a caption: the pipeline's default, and all that the denoiser takes."""
ATTENTION = r"blocks\.\d+\.attn[12]\.(to_(q|k|v|out\.0)|add_[kv]_proj)"
EXPERTS = {"high": "transformer", "low": "transformer_2"}
"""`--model.expert` -> the denoiser's name in the pipeline."""
IMAGE_EMBEDDER_KEY = "img_emb.proj.0.weight"
PATCHES_KEY = "patch_embedding.weight"
WAN_KEYS = {"head.modulation", "blocks.0.self_attn.q.weight", PATCHES_KEY}
OTHER_MODEL_KEYS = {"vace_blocks.0.after_proj.bias", "motion_encoder.dec.direction.weight"}
"""Tensors of models that were made from Wan and are not supported."""
IMAGE_CHANNELS = 36
"""Input channels of image to video: noisy latents, a mask and the first frame's latents."""
SHAPE_5B = (3072, 48)
"""Width and input channels of Wan 2.2's 5B."""


class WanLayout(ComfyLayout):
    """ComfyUI's tokens, always 512: zeros follow those of the caption."""

    def tensors(self, cond: Tensor, extras: dict[str, Any]) -> Conditioning:
        nonzero_tokens = cond[0].any(-1).nonzero()
        # the zeros are added again when a batch is made
        num_tokens = int(nonzero_tokens[-1]) + 1 if len(nonzero_tokens) else 1
        return {"prompt_embeds": cond[0, :num_tokens]}

    def conditioning(self, tensors: Conditioning) -> ComfyConditioning:
        embeds = tensors["prompt_embeds"]
        num_zeros = TOKENS - len(embeds)
        padded = nn.functional.pad(embeds, (0, 0, 0, num_zeros))
        return padded[None], {"pooled_output": None}


class Wan(VideoFamily):
    """Wan, text to video. Images are videos of one frame. Padding counts as tokens."""

    name = "wan"
    two_expert_model: ClassVar[str] = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    """Hub id of the model with two denoisers."""
    pipelines = ("WanPipeline",)
    frame_step = 4
    denoiser_class = "WanTransformer3DModel"
    vae_class = "AutoencoderKLWan"
    unused_components: ClassVar[tuple[str, ...]] = ("transformer_2",)
    layer_names = WAN_NAMES
    variable_length: ClassVar = {"prompt_embeds": TOKENS}
    max_tokens = TOKENS
    cond_width_key = "text_dim"
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|blocks\.\d+\.ffn\.net\.(0\.proj|2)",
        "all": r".*",
    }
    comfy_widths: ClassVar = {4096: "Wan"}

    @property
    def denoiser_component(self) -> str:  # type: ignore[override]
        return EXPERTS[self.config.expert or "high"]

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        other_keys = OTHER_MODEL_KEYS | {IMAGE_EMBEDDER_KEY}
        if not shapes.keys() >= WAN_KEYS or other_keys & shapes.keys():
            return False
        return input_channels(shapes) != IMAGE_CHANNELS

    def find_source(self) -> str:
        shapes = self.files.denoiser_shapes
        if shapes[PATCHES_KEY][:2] == SHAPE_5B:
            return "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
        if input_channels(shapes) == IMAGE_CHANNELS and IMAGE_EMBEDDER_KEY not in shapes:
            return self.two_expert_model
        return super().find_source()

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        inputs = config["in_channels"]
        outputs = config["out_channels"]
        if inputs != outputs:
            raise ModelError(
                f"--model.path {self.config.path}: is not a text-to-video model: its denoiser "
                f"takes {inputs} channels and returns {outputs}. Use a model of a supported kind"
            )

    @property
    def comfy_nodes(self) -> ComfyNodes:  # type: ignore[override]
        is_5b = self.latent_channels != 16
        return ComfyNodes(
            text_encoders=("umt5_xxl_fp16.safetensors",),
            text_encoder_type="wan",
            vae="wan2.2_vae.safetensors" if is_5b else "wan_2.1_vae.safetensors",
            latents="Wan22ImageToVideoLatent" if is_5b else "EmptyHunyuanLatentVideo",
            shift="ModelSamplingSD3",
        )

    @cached_property
    def boundary(self) -> float | None:
        """Noise level (sigma) from which on the expert for high noise is used.

        None if the model has one denoiser."""
        index = self.files.pipeline_config
        if index.get(EXPERTS["low"], [None])[0] is None:
            return None
        return index.get("boundary_ratio")

    @property
    def has_experts(self) -> bool:  # type: ignore[override]
        return self.boundary is not None

    def check_expert(self) -> None:
        if self.config.expert is None or self.has_experts:
            return
        hint = "Remove the option"
        if self.files.is_single_file:
            hint += (
                ", or if this is one of Wan 2.2's two files, use --model.config "
                f"{self.two_expert_model}"
            )
        raise ModelError(
            f"--model.expert {self.config.expert}: {self.config.path} has one denoiser. {hint}"
        )

    def _check_file_expert(self) -> None:
        """Raise ModelError if a single file may be either expert and --model.expert is not set."""
        if not self.files.is_single_file or self.config.expert is not None:
            return
        match = re.search("(high|low)[_-]?noise", self.files.path.name, re.IGNORECASE)
        expert = match[1].lower() if match else None
        # by its tensors, the file could be Wan 2.1
        if expert and self.config.config is None and self.name == "wan":
            raise ModelError(
                f"--model.path {self.config.path}: looks like Wan 2.2's expert for {expert} noise "
                f"by its name. Add --model.config {self.two_expert_model} --model.expert {expert}. "
                "If this is a Wan 2.1 file, rename it without high_noise or low_noise"
            )
        if self.has_experts:
            hint = f"; by its name, this file is {expert}" if expert else ""
            raise ModelError(
                f"--model.path {self.config.path}: is one of two denoisers. Add --model.expert "
                f"high or --model.expert low{hint}"
            )

    @property
    def other_denoisers(self) -> tuple[str, ...]:  # type: ignore[override]
        if not self.has_experts:
            return ()
        return tuple(name for name in EXPERTS.values() if name != self.denoiser_component)

    @property
    def latent_channels(self) -> int:  # type: ignore[override]
        return self.vae_config.get("z_dim", 16)

    @property
    def fps(self) -> float:
        return 16.0 if self.latent_channels == 16 else 24.0

    @property
    def latent_step(self) -> int:
        return self.vae_config.get("scale_factor_spatial", 8)

    @property
    def patch_size(self) -> int:
        return self.denoiser_config["patch_size"][-1]

    @cached_property
    def comfy(self) -> ComfyLayout:
        return WanLayout(self.cond_width, max_tokens=TOKENS, has_frame_axis=True)

    def process(self, config: ObjectiveConfig) -> NoiseProcess:
        self._check_file_expert()
        process = super().process(config)
        if self.boundary is not None and isinstance(process, Flow):
            boundary = process.t_of_sigma(self.boundary, tokens=0)
            if self.config.expert == "low":
                process.t_range = (0.0, boundary)
            else:
                process.t_range = (boundary, 1.0)
        return process

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        embeds, _ = encoders.encode_prompt(
            captions,
            do_classifier_free_guidance=False,
            max_sequence_length=TOKENS,
            device=encoders._execution_device,
        )
        cleaned_captions = [prompt_clean(caption) for caption in captions]
        tokens = encoders.tokenizer(cleaned_captions, truncation=True, max_length=TOKENS).input_ids
        return [
            {"prompt_embeds": embed[: len(caption_tokens)]}
            for embed, caption_tokens in zip(embeds, tokens, strict=True)
        ]

    def cond_layout(self) -> dict[str, TensorLayout]:
        return {"prompt_embeds": TensorLayout((TOKENS, self.cond_width), torch.float32)}

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        # the 5B's pipeline gives every token a timestep; from text alone, all are the same
        return denoiser(noisy, timestep, cond["prompt_embeds"], return_dict=False)[0]

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        return {"guidance_scale": guidance_scale, "num_frames": 1}

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        is_wan22 = self.has_experts or self.latent_channels != 16
        version = "wan2.2" if is_wan22 else "wan2.1"
        metadata = base_metadata(version, version)
        if self.boundary is not None:
            boundary = round(self.boundary * 1000)
            timesteps = f"0,{boundary}" if self.config.expert == "low" else f"{boundary},1000"
            metadata["modelspec.timestep_range"] = timesteps
        return metadata


def input_channels(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the input channels of a Wan denoiser with these tensors; None if it is not one."""
    shape = shapes[PATCHES_KEY]
    return shape[1] if len(shape) > 1 else None


FAMILY = Wan
