"""Wan 2.1 and 2.2, image to video: Wan, given the first frame.

The first frame is in additional channels of the input and, in 2.1, seen by CLIP. The 5B, whose
first frame has no noise instead, is trained as text to video (wan.py).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.base import TensorLayout
from models.comfy import ComfyConditioning, ComfyLayout, Conditioning
from models.comfy_nodes import ComfyNodes
from models.families.vision_family import VisionFamily
from models.families.wan import (
    IMAGE_CHANNELS,
    IMAGE_EMBEDDER_KEY,
    OTHER_MODEL_KEYS,
    TOKENS,
    WAN_KEYS,
    Wan,
    WanLayout,
    input_channels,
)
from models.latents import with_frame_axis

MASK_CHANNELS = 4
"""Channels of the mask of a latent frame, one for each frame that it is made from."""
VISION_COMPONENTS = ("image_encoder", "image_processor")
FIRST_FRAME = "first_frame"
IMAGE_EMBEDS = "image_embeds"


def text_pipeline(pipeline: Any) -> Any:
    """Return the text encoders in a pipeline that does not need the package ftfy."""
    from diffusers import WanPipeline

    return WanPipeline(pipeline.tokenizer, pipeline.text_encoder, vae=None, scheduler=None)


class FirstFrameLayout(WanLayout):
    """ComfyUI's conditioning with the latents of the first frame."""

    def tensors(self, cond: Tensor, extras: dict[str, Any]) -> Conditioning:
        tensors = super().tensors(cond, extras)
        first_frame = extras.get("concat_latent_image")
        if first_frame is not None:
            tensors[FIRST_FRAME] = first_frame[0]
        return tensors

    def conditioning(self, tensors: Conditioning) -> ComfyConditioning:
        """Return ComfyUI's conditioning, with a first frame if there is one."""
        cond, extras = super().conditioning(tensors)
        first_frame = tensors.get(FIRST_FRAME)
        if first_frame is not None:
            extras["concat_latent_image"] = first_frame[None]
        return cond, extras


class WanImageToVideo(VisionFamily, Wan):
    """Wan, image to video. Every video is trained with its own first frame."""

    name = "wan_i2v"
    two_expert_model = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
    pipelines = ("WanImageToVideoPipeline",)
    unused_components: ClassVar[tuple[str, ...]] = ("transformer_2", *VISION_COMPONENTS)
    has_image_input = True

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        if not shapes.keys() >= WAN_KEYS or OTHER_MODEL_KEYS & shapes.keys():
            return False
        return IMAGE_EMBEDDER_KEY in shapes or input_channels(shapes) == IMAGE_CHANNELS

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        channels = config["in_channels"]
        expected_channels = 2 * config["out_channels"] + MASK_CHANNELS
        if channels != expected_channels:
            raise ModelError(
                f"--model.path {self.config.path}: is not an image-to-video model of this kind: "
                f"its denoiser takes {channels} channels, not {expected_channels}. Use a model of "
                "a supported kind"
            )

    @property
    def comfy_nodes(self) -> ComfyNodes:  # type: ignore[override]
        return replace(super().comfy_nodes, latents="WanImageToVideo")

    @property
    def has_clip_input(self) -> bool:
        """True if the denoiser is given CLIP's states of the first frame."""
        return self.denoiser_config.get("image_dim") is not None

    @property
    def vision_components(self) -> tuple[str, ...]:
        return VISION_COMPONENTS if self.has_clip_input else ()

    @property
    def sample_conditioning(self) -> tuple[str, ...]:
        return (FIRST_FRAME, IMAGE_EMBEDS) if self.has_clip_input else (FIRST_FRAME,)

    @cached_property
    def comfy(self) -> ComfyLayout:
        return FirstFrameLayout(
            self.cond_width,
            max_tokens=TOKENS,
            required=self.sample_conditioning,
            has_frame_axis=True,
        )

    def load_encoders(self, role: Literal["text", "media"]) -> Any:
        encoders = super().load_encoders(role)
        return encoders if role == "media" else text_pipeline(encoders)

    def pipeline(self, denoiser: nn.Module | None, with_text_encoders: bool = True) -> Any:
        pipeline = super().pipeline(denoiser, with_text_encoders)
        pipeline.encode_prompt = text_pipeline(pipeline).encode_prompt
        return pipeline

    def encode_sample_conditioning(
        self, encoders: Any, pixels: Tensor, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Encode the first frame, followed by gray frames, and CLIP's states of the first frame."""
        video = with_frame_axis(pixels, True)
        first_frame = video[:, :, 0]
        gray_video = torch.zeros_like(video)
        gray_video[:, :, 0] = first_frame
        mean, _ = self.encode_media(encoders, gray_video)
        tensors = {FIRST_FRAME: mean}
        if self.has_clip_input:
            tensors[IMAGE_EMBEDS] = clip_states(encoders, first_frame)
        return tensors

    def sample_layout(self, latents: tuple[int, ...]) -> dict[str, TensorLayout]:
        first_frame = TensorLayout(latents, torch.float32)
        if not self.has_clip_input:
            return {FIRST_FRAME: first_frame}
        config = self.component_config("image_encoder")
        side = config["image_size"] // config["patch_size"]
        num_tokens = side * side + 1
        width = config["hidden_size"]
        shape = (num_tokens, width)
        image_embeds = TensorLayout(shape, torch.float32)
        return {
            FIRST_FRAME: first_frame,
            IMAGE_EMBEDS: image_embeds,
        }

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        mask = noisy.new_zeros(len(noisy), MASK_CHANNELS, *noisy.shape[2:])
        mask[:, :, 0] = 1
        first_frame = self.normalize(cond[FIRST_FRAME]).to(noisy.dtype)
        return denoiser(
            torch.cat([noisy, mask, first_frame], 1),
            timestep,
            cond["prompt_embeds"],
            encoder_hidden_states_image=cond.get(IMAGE_EMBEDS),
            return_dict=False,
        )[0]


def clip_states(encoders: Any, pixels: Tensor) -> Tensor:
    """Return the last state but one of CLIP's vision model for images (B, 3, H, W).

    The pipeline gives it images of whole numbers in [0, 255]."""
    values = (pixels + 1) * 127.5
    images = values.round().to(torch.uint8).cpu()
    inputs = encoders.image_processor(images=list(images), return_tensors="pt")
    inputs = inputs.to(pixels.device)
    outputs = encoders.image_encoder(**inputs, output_hidden_states=True)
    return outputs.hidden_states[-2]


FAMILY = WanImageToVideo
